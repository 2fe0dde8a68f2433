"""DyLLM's saliency as row sets (arXiv 2603.08026, and its authors' code where the two differ).

A row whose attention context barely turned since the step before is not computed again by the MLP, nor are its key and
value in the next layer. In the first layer the salient rows are those whose token changed; each layer chooses those of
the next:

    role                         rows
    query, context, branch       active; exact for the salient ones, from the change of their values for the others
    key, value                   salient in the layer before
    MLP branch                   salient in this layer

Rows that are computed for samplers alone are salient throughout, as nothing is kept of them that is current, and enter
no state. A layer is cut behind its attention, since that decides how many rows the MLP computes.
"""

from __future__ import annotations

from dataclasses import replace

from dllm_compile.core.assignment import ACTIVE, CONTEXTS, SALIENT, Assignment


def with_contexts(assignment: Assignment) -> Assignment:
    """A step whose contexts and MLP rows are kept for later ones."""
    return replace(assignment, keep=CONTEXTS) if assignment.keep else assignment


def salient(partial: Assignment) -> Assignment:
    """A step that recomputes the salient ones of its active rows."""
    return replace(partial, name="salient", key=SALIENT, value=SALIENT, mlp=SALIENT)


def thorough(assignment: Assignment) -> Assignment:
    """The same step with every active row salient, whatever its context does."""
    return replace(assignment, name="block", key=ACTIVE, value=ACTIVE, mlp=None)
