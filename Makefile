# SPDX-License-Identifier: Apache-2.0
# Forwards to ./run, ./check and meson, which is the one build description.
.PHONY: all check install clean
all:
	./run --build-only
check:
	./check
install: all
	meson install -C build
clean:
	rm -rf build build-asan build-tsan
