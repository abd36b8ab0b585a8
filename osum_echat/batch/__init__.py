"""Work over many records: one interface (`work.Engine`), two engines.

`local.LocalEngine` works in this process. `ray_data.RayEngine` shares the work out over the workers of a Ray cluster.
What is worked on, and how, is a `work.Work`: the answers of `osum-echat batch`, the speech tokens of `osum-echat
tokens`, the generate step of `osum-echat eval`. Results come to the process that started the run, which alone writes
them (`output`), so nothing is written twice.
"""
