"""The Django app that `django_project.py` migrates and uses."""
