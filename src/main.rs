//! The program `qkv`. What it does is in the library; what it says is in `cli`.

mod cli;

fn main() -> std::process::ExitCode {
    cli::run()
}
