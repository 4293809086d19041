"""One module a room: how a recorded case of each kind is run. `RUNNERS`: kind -> function; `FUNCTIONS`: case name -> function."""
