"""Other systems on potluck's task: same model, samples, order, lines and speed of the machines.

Each program runs once per host: ``python -m benchmarks.rivals.NAME --task task.json --rank R --world N
--address MY_IP --peers IP,IP,... --out FILE``; ``python -m benchmarks.rivals`` starts all of one on this machine.
They need an environment of their own, see ``requirements.txt``. What all share:

``task``    what is trained, on which samples, and what a host is told
``pace``    every host as fast as one machine of a given speed, though few cores serve all
``record``  the lines that a host writes while it trains
``rounds``  whether ranks that say they averaged really did
``model``   potluck's own model and optimizer, paced
``judge``   held-out loss of the snapshots that hosts leave, outside of their clocks
``start``   starts the hosts, stops them, and says what came of it
"""
