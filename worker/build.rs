//! Lets the worker's executables find libtorch without environment variables: the directory that it was built
//! against becomes their run path. `LD_LIBRARY_PATH` still comes first. Tells them its version, and compiles what the worker
//! adds to it.

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-changed=src/model/native/prelu.cpp");
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
                .include(format!("{dir}/include"))
                .include(format!("{dir}/include/torch/csrc/api/include"))
                // libtorch's headers are not ours to clean.
                .warnings(false)
                .file("src/model/native/prelu.cpp")
                .compile("arcface_native");
        }
        Err(_) => println!(
            "cargo:warning=LIBTORCH is not set: run `make build`, which fetches libtorch and sets it"
        ),
    }
}
