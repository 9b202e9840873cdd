"""Environments of a user's own, played in processes of their own: one for each episode.

origin.py   how an environment is made again in another process
pool.py     the side of the run: starts hosts, and plays an episode in one
host.py     a process that has loaded an environment, and forks a player for every episode
player.py   one episode
"""
