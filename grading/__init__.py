"""The instructor's side: build the course, grade submissions, report on a class.

Not part of the wheel that learners install. Every hop reads one path, calls one function and writes one
path: `build`, `run`, `judge`, `score`, `feedback`. Only `run` touches code that learners wrote.
"""
