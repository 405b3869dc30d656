"""The files that ship inside every checkpoint; they import nothing from hireconvert.

`modeling_hire` model classes, `hire_io` loading and saving, `hire_config` what a config may say,
`hire_install` putting selection into native layers, `hire_predict` predictors and top-k,
`hire_select` what a row keeps, `hire_native` the way to the native kernels, `hire_blocks`,
`hire_cache` and `hire_step` the native decode step, `hire_token` a whole token in one call,
`hire_sample` the loop over tokens, `hire_draw` the choice of one of few rows, `hire_ffn` the sparse
FFN, `hire_head` the sparse LM head, `hire_head_native` the way to its native kernels, `hire_memory`
what a load mode keeps in memory.
"""

RUNTIME_FILES = (
    "modeling_hire.py",
    "hire_codes.py",
    "hire_config.py",
    "hire_install.py",
    "hire_io.py",
    "hire_memory.py",
    "hire_predict.py",
    "hire_select.py",
    "hire_native.py",
    "hire_cache.py",
    "hire_blocks.py",
    "hire_token.py",
    "hire_step.py",
    "hire_draw.py",
    "hire_sample.py",
    "hire_ffn.py",
    "hire_head_native.py",
    "hire_head.py",
)
