"""What a mechanism says of itself and what it is told: types that passes, schedules and users share."""
