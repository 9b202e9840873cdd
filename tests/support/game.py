"""The source of an environment of a user's own: a file that tests write beside their recipes."""

GAME = '''
"""Say a digit; the game answers with the next one; say that."""

from sapo.data import Prompt, Score, Status


class Next:
    name, stop = "next", ("=",)

    def __init__(self, seed=0, fails=0, held_out_fails=False, name="next"):
        self.fails, self.held_out_fails, self.name = fails, held_out_fails, name

    def train_prompt(self, index):
        return Prompt(index, self.name, f"{index % 7}=", answer="7")

    def held_out(self, count):
        marked = {"fails": self.held_out_fails}
        return [Prompt(i, self.name, f"{i}=", answer="7", metadata=marked) for i in range(min(count, 4))]

    async def play(self, prompt, ask):
        if prompt.metadata.get("fails") or (self.fails and prompt.id % self.fails == 0):
            raise ConnectionError("the board is gone")
        sevens, heard = 0, ""
        for _ in range(3):
            turn = await ask(heard, max_tokens=5)
            sevens += turn.text.count("7") + turn.text.count("3")
            heard = f"{ask.seed % 10};"
        return Score(sevens / 8, figures={"sevens": float(sevens)})
'''
