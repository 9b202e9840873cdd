"""Our objectives inside other trainers: TRL's (`sapo.integrations.trl`) and verl's (`sapo.integrations.verl`).

Each module imports its host when it is imported itself; nothing else in this package does.
"""
