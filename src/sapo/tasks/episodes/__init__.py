"""Environments of a user's own, played in processes of their own: one for each episode.

origin.py      how an environment is made again in another process
elsewhere.py   the side of the run: plays an episode in a player that a host forks
pool.py        starts the hosts
line.py        the socket of an episode, as the run sees it
host.py        a process that has loaded an environment, and forks a player for every episode
player.py      one episode
"""
