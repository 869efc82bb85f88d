# make        set up what is missing and build the preset (cpu, unless PRESET= says another); make program leaves the tests out
# make demo   the main job: recall and text (TEXT=DIR for your own text)
# make test   the whole test suite
# make bench  the benchmarks
# PRESET=cuda builds for Hopper GPUs too, with CUDA's libraries, and nvcc where there is none, in .deps/ (docs/cuda.md)
PRESET ?= cpu
BUILD  := build/$(PRESET)
JOBS   ?= $(shell nproc)
TEXT   ?=

.PHONY: build program configure setup demo test bench format clean
build: configure
	@cmake --build $(BUILD) --parallel $(JOBS)

program: configure
	@cmake --build $(BUILD) --parallel $(JOBS) --target oryx_program

configure: setup
	@cmake --preset $(PRESET) $(if $(wildcard $(BUILD)/build.ninja),> $(BUILD)/configure.log)

setup:
	@tools/setup.sh $(PRESET)

demo: program
	@$(BUILD)/oryx demo $(if $(TEXT),--text $(TEXT))

test: build
	@cd $(BUILD) && ctest --output-on-failure --parallel $(JOBS)

bench: configure
	@cmake --build $(BUILD) --parallel $(JOBS) --target oryx_bench
	@$(BUILD)/oryx_bench

format:
	@git clang-format --force --extensions cc,h,cu,cuh

clean:
	rm -rf build
