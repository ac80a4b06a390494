//! Lets the worker's executables find libtorch without environment variables: the directory that it was built
//! against becomes their run path. `LD_LIBRARY_PATH` still comes first.

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    match std::env::var("LIBTORCH") {
        Ok(dir) => println!("cargo:rustc-link-arg=-Wl,-rpath,{dir}/lib"),
        Err(_) => println!(
            "cargo:warning=LIBTORCH is not set: run `make build`, which fetches libtorch and sets it"
        ),
    }
}
