# make        set up what is missing and build the preset (cpu, unless PRESET= says another)
# make demo   the main job: recall and text (TEXT=DIR for your own text)
# make test   the whole test suite
# make bench  the benchmarks
PRESET ?= cpu
BUILD  := build/$(PRESET)
JOBS   ?= $(shell nproc)
TEXT   ?=

.PHONY: build setup demo test bench format clean
build: setup
	@cmake --preset $(PRESET) $(if $(wildcard $(BUILD)/build.ninja),> $(BUILD)/configure.log)
	@cmake --build $(BUILD) --parallel $(JOBS)

setup:
	@tools/setup.sh

demo: build
	@$(BUILD)/oryx demo $(if $(TEXT),--text $(TEXT))

test: build
	@cd $(BUILD) && ctest --output-on-failure --parallel $(JOBS)

bench: build
	@cmake --build $(BUILD) --parallel $(JOBS) --target oryx_bench
	@$(BUILD)/oryx_bench

format:
	@git ls-files '*.cc' '*.h' '*.cu' | xargs clang-format -i

clean:
	rm -rf build
