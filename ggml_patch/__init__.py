"""The patched llama-cpp-python: what is pinned, what is changed, and how it is built.

``UPSTREAM.toml`` holds the pin, ``series/`` the patches (hooks only), ``spike/`` the new sources. ``apply``
turns an unpacked source package into the patched one and back, ``build`` does everything from download to
installation.
"""
