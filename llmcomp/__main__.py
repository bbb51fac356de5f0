"""python -m llmcomp"""

from llmcomp.cli.main import run

run()
