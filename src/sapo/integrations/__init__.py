"""Our objectives inside other people's trainers, for those who stay there: `sapo.integrations.trl`, `.verl`.

Each module imports its host when it is imported itself; nothing else in this package does.
"""
