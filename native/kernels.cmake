# add_kernels(TARGET SOURCE [OPTIONS...]) compiles kernels.cpp, or a source that includes it, once
# for each instruction set, and adds all builds to TARGET; machine.cpp chooses one at run time.
# KERNELS are then the names of the builds, those of their targets being kernels_<name>.
function(add_kernels target source)
  set(names baseline)
  # Where there are fused multiplications (Arm), the compiler would take them for whole vectors and
  # not for parts of one, and a tensor elsewhere in memory would have other bits.
  set(flags_baseline -O3 -ffp-contract=off)
  set(flags_avx2 -O3 -mavx2 -mfma -mf16c)
  set(flags_avx512 -O3 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c
      -mprefer-vector-width=512 -Wno-uninitialized -Wno-maybe-uninitialized)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
    target_compile_definitions(${target} PRIVATE EVENKEEL_X86)
    list(APPEND names avx2 avx512)
    # For processors from before 2013: what compiles in a fifth of the time.
    list(APPEND flags_baseline -O1 -DEVENKEEL_FEWER_LOOPS)
  endif()
  foreach(isa ${names})
    add_library(kernels_${isa} OBJECT ${source})
    target_compile_features(kernels_${isa} PRIVATE cxx_std_20)
    target_compile_definitions(kernels_${isa} PRIVATE EVENKEEL_ISA=${isa})
    target_compile_options(kernels_${isa} PRIVATE -fno-math-errno -ffp-contract=fast
                           -fvisibility=hidden -Wall -Wextra -Wno-psabi -Wno-ignored-attributes
                           ${flags_${isa}} ${ARGN})
    set_target_properties(kernels_${isa} PROPERTIES POSITION_INDEPENDENT_CODE ON)
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:kernels_${isa}>)
  endforeach()
  set(KERNELS ${names} PARENT_SCOPE)
endfunction()
