//! Lets the worker's executables find libtorch without environment variables: the directory that it was built
//! against becomes their run path. `LD_LIBRARY_PATH` still comes first. Tells them its version, and compiles what the worker
//! adds to it. For tests it compiles the CUDA kernels for the CPU too.

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    const NATIVE: [&str; 10] = [
        "src/device/gpu.cpp",
        "src/device/graph.cpp",
        "src/model/native/allocations.cpp",
        "src/model/native/backward.cpp",
        "src/model/native/convolution.cpp",
        "src/model/native/layout.cpp",
        "src/model/native/prelu.cpp",
        "src/model/norm/autograd.cpp",
        "src/model/norm/cpu.cpp",
        "src/optim/fused.cpp",
    ];
    const HEADERS: [&str; 2] = ["src/model/native/rows.h", "src/model/norm/cpu.h"];
    for source in NATIVE.iter().chain(&HEADERS) {
        println!("cargo:rerun-if-changed={source}");
    }
    match std::env::var("LIBTORCH") {
        Ok(dir) => {
            println!("cargo:rustc-link-arg=-Wl,-rpath,{dir}/lib");
            if let Ok(version) = std::fs::read_to_string(format!("{dir}/build-version")) {
                println!("cargo:rustc-env=ARCFACE_LIBTORCH_VERSION={}", version.trim());
            }
            cc::Build::new()
                .cpp(true)
                .std("c++17")
                .opt_level(3)
                // Nobody looks at the flags of floating-point exceptions: both ways of a choice may be computed, which is what
                // makes the loops vectors.
                .flag("-fno-trapping-math")
                // Vectors are passed to functions that become part of their callers: there is no interface to be compatible with.
                .flag("-Wno-psabi")
                // Without it at::parallel_for is a loop on one thread.
                .flag("-fopenmp")
                .include(format!("{dir}/include"))
                .include(format!("{dir}/include/torch/csrc/api/include"))
                // libtorch's headers are not ours to clean.
                .warnings(false)
                .files(NATIVE)
                .compile("arcface_native");
            link_openmp(&dir);
        }
        Err(_) => println!(
            "cargo:warning=LIBTORCH is not set: run `make build`, which fetches libtorch and sets it"
        ),
    }
    kernels_for_the_cpu();
}

/// OpenMP's threads are libtorch's own, so it has to be its own library, under whatever name it ships: two of them would have two
/// sets of threads that wait for each other's processors.
fn link_openmp(libtorch: &str) {
    let libraries = std::fs::read_dir(format!("{libtorch}/lib"))
        .into_iter()
        .flatten()
        .flatten();
    let names = libraries.filter_map(|library| library.file_name().into_string().ok());
    match names
        .into_iter()
        .find(|name| name.starts_with("libgomp") && name.contains(".so"))
    {
        Some(name) => {
            println!("cargo:rustc-link-search=native={libtorch}/lib");
            println!("cargo:rustc-link-lib=dylib:+verbatim={name}");
        }
        None => println!("cargo:rustc-link-lib=dylib=gomp"),
    }
}

/// The twins of our CUDA kernels, which tests call (`kernels/twin`). Releases are built without: there is nothing of
/// it in an executable that is shipped.
fn kernels_for_the_cpu() {
    println!("cargo:rerun-if-changed=src/head/cuda");
    println!("cargo:rerun-if-changed=src/kernels");
    println!("cargo:rerun-if-changed=src/model/norm/norm.cu");
    println!("cargo:rustc-check-cfg=cfg(cuda_twin)");
    if std::env::var("PROFILE").is_ok_and(|profile| profile == "release") {
        return;
    }
    println!("cargo:rustc-cfg=cuda_twin");
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        // Products and sums are rounded each for itself where the kernels say so.
        .flag("-ffp-contract=off")
        // The compiler takes the switch of stacks for a jump.
        .flag_if_supported("-Wno-clobbered")
        .include("src/head/cuda")
        .flag("-Wno-unknown-pragmas")
        .include("src")
        .include("src/kernels")
        .file("src/kernels/twin/twin.cpp")
        .compile("arcface_cuda_twin");
}
