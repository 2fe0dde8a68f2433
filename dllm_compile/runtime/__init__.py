"""One call of a compiled graph. A call goes through these files in this order:

1. ``programs``, ``program``    the graph, analyzed for the sizes of the call; its parts and their code
2. ``session``                  which sequences the call goes on with (``batch``), by what is ``read`` of ids, inputs
                                and weights (``unchanged``), and whether they are those of a loop (``evidence``);
                                with guidance, two calls a step are of ``one_response``
3. ``next_step``                the ``step`` that it is: the rows that the schedule plans, as ``positions``
4. ``run``                      compute the step, replay it (``recordings``), or return what is kept of the last call
5. ``graph_call``               the variant that each part runs, on which rows (``skipping``), and its ``call_values``
6. ``unit_code``, ``lower``     the compiled code of a part, for one variant

Where a graph broke, ``chain`` joins the graphs of one call. ``stats`` counts, ``cost`` counts FLOPs and bytes.
"""
