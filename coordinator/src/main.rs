//! `arcface-coordinator`: parse, run, exit code.

fn main() -> std::process::ExitCode {
    arcface_coordinator::cli::main()
}
