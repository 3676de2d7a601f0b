# The target vlprune_ops, made where there is a C++ compiler that can; included by vlprune and by vlprune-edge.

include(CheckLanguage)
check_language(CXX)
if(NOT CMAKE_CXX_COMPILER)
  message(STATUS "vlprune: no C++ compiler, installing without the operators for ONNX Runtime")
  return()
endif()
enable_language(CXX)
include(CheckCXXSourceCompiles)
# The kernels are written with vector extensions, whose shuffles have two spellings. GCC 10 knows no "f16c".
foreach(shuffle "SHUFFLEVECTOR;__builtin_shufflevector(x, x, 0, 2, 4, 6)" "SHUFFLE;__builtin_shuffle(x, x, I{0, 2, 4, 6})")
  list(GET shuffle 0 name)
  list(GET shuffle 1 call)
  check_cxx_source_compiles("
    typedef float F __attribute__((vector_size(16)));
    typedef int I __attribute__((vector_size(16)));
    #if defined(__x86_64__)
    bool known = __builtin_cpu_supports(\"f16c\");
    #endif
    int main() { F x{}; x = ${call}; return static_cast<int>(x[0]); }"
    VLPRUNE_HAS_${name})
endforeach()
if(MSVC OR NOT (VLPRUNE_HAS_SHUFFLEVECTOR OR VLPRUNE_HAS_SHUFFLE))
  message(STATUS "vlprune: the C++ compiler is not GCC 11, Clang, or newer, installing without the operators for ONNX Runtime")
  return()
endif()

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release)
endif()

set(VLPRUNE_CSRC ${CMAKE_CURRENT_LIST_DIR})
file(GLOB VLPRUNE_SOURCES CONFIGURE_DEPENDS ${VLPRUNE_CSRC}/*.cpp)

# One file per instruction set; which is used is decided at run time.
check_cxx_source_compiles("#if !defined(__x86_64__)\n#error other\n#endif\nint main() { return 0; }" VLPRUNE_X86_64)
if(VLPRUNE_X86_64)
  set_source_files_properties(${VLPRUNE_CSRC}/kernels_avx2.cpp PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma;-mf16c")
  set_source_files_properties(${VLPRUNE_CSRC}/kernels_avx512.cpp PROPERTIES
    # GCC 12 warns about its own intrinsics, which leave registers undefined on purpose.
    COMPILE_OPTIONS "-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mfma;-mf16c;-Wno-uninitialized;-Wno-maybe-uninitialized")
else()
  list(FILTER VLPRUNE_SOURCES EXCLUDE REGEX "/kernels_avx[^/]*$")
endif()

add_library(vlprune_ops SHARED ${VLPRUNE_SOURCES})
set_target_properties(vlprune_ops PROPERTIES
  PREFIX lib # one name everywhere
  CXX_STANDARD 17
  CXX_STANDARD_REQUIRED ON
  CXX_EXTENSIONS OFF
  CXX_VISIBILITY_PRESET hidden
  VISIBILITY_INLINES_HIDDEN ON)
target_compile_options(vlprune_ops PRIVATE -O3 -fno-math-errno -ffp-contract=fast -Wall -Wextra)
if(NOT VLPRUNE_HAS_SHUFFLEVECTOR)
  target_compile_definitions(vlprune_ops PRIVATE VLPRUNE_NO_SHUFFLEVECTOR)
endif()
if(SKBUILD_PROJECT_VERSION)
  target_compile_definitions(vlprune_ops PRIVATE VLPRUNE_VERSION="${SKBUILD_PROJECT_VERSION}")
endif()

if(VLPRUNE_SANITIZE)
  # -Og builds in a third of the time of -O1 and runs as fast.
  set(VLPRUNE_SANITIZERS -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -Og)
  target_compile_options(vlprune_ops PRIVATE ${VLPRUNE_SANITIZERS})
  target_link_options(vlprune_ops PRIVATE ${VLPRUNE_SANITIZERS})
else()
  # Each where the linker has it: no need of a libstdc++ as new as this one, none of its symbols shown to others, and
  # no unloading, since ONNX Runtime keeps pointers into the library.
  foreach(flags "-static-libstdc++;-static-libgcc" "-Wl,--version-script=${VLPRUNE_CSRC}/exports.map" "-Wl,-z,nodelete")
    string(MD5 result "${flags}")
    set(result VLPRUNE_LINKS_${result})
    set(CMAKE_REQUIRED_LINK_OPTIONS ${flags})
    check_cxx_source_compiles("#include <string>\nint main() { return std::string().size(); }" ${result})
    unset(CMAKE_REQUIRED_LINK_OPTIONS)
    if(${result})
      target_link_options(vlprune_ops PRIVATE ${flags})
    endif()
  endforeach()
endif()
