"""Settings of nbgrader for the solved notebooks: put this file into the root of the nbgrader course."""

c = get_config()  # noqa: F821
c.ClearSolutions.code_stub = {"python": "...  # your code here"}  # the default raises an error, which stops "Run all"
c.Execute.timeout = 600  # seconds for a cell; some train a model
