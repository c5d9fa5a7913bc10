# SPDX-License-Identifier: Apache-2.0
"""Its place here lets the tests of all folders below import harness.py and its neighbours."""
