"""The files that ship inside every checkpoint; they import nothing from hireconvert.

`modeling_hire.py` holds the model classes, `hire_config.py` what a config may say, `hire_ffn.py`
the sparse FFN, `hire_head.py` the head.
"""

RUNTIME_FILES = ("modeling_hire.py", "hire_config.py", "hire_ffn.py", "hire_head.py")
