# Kernels are compiled once per ISA, each from csrc/kernel/isa/<isa>.cpp with that ISA's flags, and live in one extension.
#
#   hetero_isa(<name> <flags...>)     probe the compiler; if it knows the flags, add object library isa_<name>
#   hetero_isas_into(<target>)        link them, best first, and write isa_list.h
#
# The guard: the linker keeps one copy of an inline function, and that copy may be the AVX-512 one. So an ISA object may show
# exactly one global symbol, its kernel table. This file, run as a script (cmake -P) with NM, OBJECT and STAMP, checks that.

if(CMAKE_SCRIPT_MODE_FILE)
  execute_process(COMMAND ${NM} --extern-only --defined-only ${OBJECT} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX REPLACE "\n$" "" symbols "${symbols}")
  string(REPLACE "\n" ";" symbols "${symbols}")
  foreach(symbol IN LISTS symbols)
    if(NOT symbol MATCHES " [BDR] .*kernel_table_")  # B: the address sanitizer's mark of the table
      message(FATAL_ERROR "${OBJECT} exports '${symbol}': code compiled for one ISA must not be visible to the others. "
                          "Give it internal linkage (an anonymous namespace), and keep the STL out of csrc/kernel/isa.")
    endif()
  endforeach()
  file(TOUCH ${STAMP})
  return()
endif()

include(CheckCXXSourceCompiles)
set(HETERO_ISA_FILE ${CMAKE_CURRENT_LIST_FILE})
set(HETERO_ISAS "")

function(hetero_isa name)
  list(JOIN ARGN " " CMAKE_REQUIRED_FLAGS)
  check_cxx_source_compiles("#include <immintrin.h>\nint main() { return 0; }" HETERO_COMPILES_${name})
  if(NOT HETERO_COMPILES_${name})
    message(WARNING "the compiler does not know ${CMAKE_REQUIRED_FLAGS}: kernels for ${name} are left out")
    return()
  endif()
  add_library(isa_${name} OBJECT csrc/kernel/isa/${name}.cpp)
  target_include_directories(isa_${name} PRIVATE csrc)
  # Contracting a * b + c would change bits from ISA to ISA. gcc 12 warns about its own _mm512_undefined_* (PR 105593).
  target_compile_options(isa_${name} PRIVATE ${optimize} -ffp-contract=off -fno-strict-aliasing -fno-exceptions
    -fvisibility=hidden -Wno-maybe-uninitialized ${ARGN})
  set_target_properties(isa_${name} PROPERTIES POSITION_INDEPENDENT_CODE ON INTERPROCEDURAL_OPTIMIZATION OFF)
  set(HETERO_ISAS ${HETERO_ISAS} ${name} PARENT_SCOPE)
endfunction()

function(hetero_isas_into target)
  set(list "")
  foreach(name IN LISTS HETERO_ISAS)
    set(stamp ${CMAKE_CURRENT_BINARY_DIR}/isa_${name}.checked)
    add_custom_command(OUTPUT ${stamp}
      COMMAND ${CMAKE_COMMAND} -DNM=${CMAKE_NM} -DOBJECT=$<TARGET_OBJECTS:isa_${name}> -DSTAMP=${stamp} -P ${HETERO_ISA_FILE}
      DEPENDS isa_${name} $<TARGET_OBJECTS:isa_${name}> ${HETERO_ISA_FILE} VERBATIM)
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:isa_${name}> ${stamp})
    string(APPEND list " X(${name})")
  endforeach()
  file(CONFIGURE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/generated/isa_list.h CONTENT "#define HETERO_ISAS(X)${list}\n" @ONLY)
  target_include_directories(${target} PRIVATE ${CMAKE_CURRENT_BINARY_DIR}/generated)
endfunction()
