"""How a recorded case of each kind is run. `RUNNERS`: kind -> function; `FUNCTIONS`: case name -> function."""
