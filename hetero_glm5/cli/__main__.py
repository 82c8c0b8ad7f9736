from hetero_glm5.cli.app import app

app(prog_name="hetero-glm5")
