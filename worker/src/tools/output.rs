//! What the offline tools have in common about their outputs.

use arcface_proto::failure::{ExitCode, Failure};
use std::path::Path;

/// How results are printed.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// For people.
    Table,
    /// For programs: JSON.
    Json,
}

/// Refuses a file to write that is one of the inputs, by whatever name.
///
/// # Errors
/// A usage error that names the file.
pub fn no_input<'a>(path: &Path, inputs: impl IntoIterator<Item = &'a Path>) -> Result<(), Failure> {
    let Ok(real) = path.canonicalize() else {
        return Ok(());
    };
    let same = |input: &Path| input.canonicalize().is_ok_and(|input| input == real);
    match inputs.into_iter().any(same) {
        true => {
            let message = format!("{}: the output would replace the input", path.display());
            Err(Failure::new(ExitCode::Usage, message).hint("name another place for the output"))
        }
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_input_is_known_by_every_name() {
        let folder = tempfile::tempdir().expect("scratch");
        let (input, other) = (folder.path().join("in"), folder.path().join("other"));
        std::fs::write(&input, "1").expect("written");
        std::fs::write(&other, "2").expect("written");
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&input, &link).expect("linked");
        let roundabout = folder.path().join(".").join("in");
        for output in [&input, &link, &roundabout] {
            let failure = no_input(output, [other.as_path(), &input]).expect_err("refused");
            assert_eq!(failure.code, ExitCode::Usage);
            assert!(
                failure.message.ends_with("the output would replace the input"),
                "{failure:?}"
            );
        }
        let new = folder.path().join("new");
        assert!(no_input(&other, [input.as_path()]).is_ok());
        assert!(
            no_input(&new, [input.as_path(), &new]).is_ok(),
            "nothing is there"
        );
    }
}
