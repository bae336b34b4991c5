# CUTLASS's headers, for the Hopper kernels: from FEWSTEP_CUTLASS_DIR (a checkout, or any folder with
# include/cutlass), else from the nvidia-cutlass wheel. Only the headers are used, so the wheel is
# downloaded into the build folder without what it requires (pip is a build requirement for this), and
# unpacked, not installed.
set(FEWSTEP_CUTLASS_VERSION "4.2.0.0")
set(FEWSTEP_CUTLASS_DIR "$ENV{FEWSTEP_CUTLASS_DIR}" CACHE PATH "folder with include/cutlass")

function(find_cutlass result)
  if(FEWSTEP_CUTLASS_DIR)
    set(include "${FEWSTEP_CUTLASS_DIR}/include")
    if(NOT EXISTS "${include}/cutlass/cutlass.h")
      message(FATAL_ERROR "FEWSTEP_CUTLASS_DIR: expected a folder with include/cutlass/cutlass.h, "
        "got ${FEWSTEP_CUTLASS_DIR}")
    endif()
  else()
    set(folder "${CMAKE_BINARY_DIR}/cutlass-${FEWSTEP_CUTLASS_VERSION}")
    set(include "${folder}/cutlass_library/source/include")
    if(NOT EXISTS "${include}/cutlass/cutlass.h")
      message(STATUS "fewstep: fetching the headers of nvidia-cutlass ${FEWSTEP_CUTLASS_VERSION}")
      file(MAKE_DIRECTORY "${folder}")
      execute_process(
        COMMAND "${Python_EXECUTABLE}" -m pip download --quiet --no-deps --only-binary=:all:
          --dest "${folder}" "nvidia-cutlass==${FEWSTEP_CUTLASS_VERSION}"
        RESULT_VARIABLE status ERROR_VARIABLE errors OUTPUT_VARIABLE errors)
      file(GLOB wheel "${folder}/nvidia_cutlass-*.whl")
      if(NOT status EQUAL 0 OR NOT wheel)
        message(FATAL_ERROR "CUTLASS's headers could not be fetched; set FEWSTEP_CUTLASS_DIR to a "
          "folder with include/cutlass, or FEWSTEP_CUDA=off.\n${errors}")
      endif()
      file(ARCHIVE_EXTRACT INPUT "${wheel}" DESTINATION "${folder}"
        PATTERNS "cutlass_library/source/include/*")
    endif()
  endif()
  set(${result} "${include}" PARENT_SCOPE)
endfunction()
