//! Where a job may write on a node: a decision about paths, pure except that existing directories are resolved so
//! that a symbolic link does not lead out of a root. What it may read is decided in `data/roots`.

use arcface_proto::failure::{ExitCode, Failure};
use std::path::{Component, Path, PathBuf};

/// Directory of a job's model, log and checkpoints.
///
/// A relative `output` lies under `root`; an absolute one must lie inside `root` if the node names one.
/// `root` is empty when the node was started without `--output-root`: then relative paths start at the current
/// directory and absolute ones may lie anywhere.
///
/// # Errors
/// For an empty path, one with `..`, and one outside the root.
pub fn output_directory(root: &str, output: &str) -> Result<PathBuf, Failure> {
    below_root("output", root, output)
}

/// Directory of `checkpoint.location`, by the same rules.
///
/// # Errors
/// As [`output_directory`].
pub fn checkpoint_directory(root: &str, directory: &str) -> Result<PathBuf, Failure> {
    below_root("checkpoint.location", root, directory)
}

/// `key` is the job's key that says so.
fn below_root(key: &str, root: &str, output: &str) -> Result<PathBuf, Failure> {
    let wanted = Path::new(output);
    if output.is_empty() || output.contains('\0') {
        return Err(Failure::new(
            ExitCode::Usage,
            format!("{key}: the job names no directory"),
        ));
    }
    if wanted.components().any(|part| part == Component::ParentDir) {
        return Err(Failure::new(
            ExitCode::Usage,
            format!("{key}: {output:?} must not contain \"..\""),
        ));
    }
    if root.is_empty() {
        return Ok(wanted.to_path_buf());
    }
    let root = Path::new(root);
    let joined = root.join(wanted);
    if !resolved(&joined).starts_with(resolved(root)) {
        return Err(Failure::new(
            ExitCode::Usage,
            format!(
                "{key}: {output:?} is outside this node's output root {}",
                root.display()
            ),
        )
        .hint("write a path inside of it, or start the worker with another --output-root"));
    }
    Ok(joined)
}

/// The path with links of its longest existing part followed; what does not exist yet is kept as written.
fn resolved(path: &Path) -> PathBuf {
    let mut missing = Vec::new();
    let mut existing = path;
    loop {
        if let Ok(mut real) = existing.canonicalize() {
            real.extend(missing.iter().rev());
            return real;
        }
        match (existing.parent(), existing.file_name()) {
            (Some(parent), Some(name)) => {
                missing.push(name);
                existing = if parent.as_os_str().is_empty() {
                    Path::new(".")
                } else {
                    parent
                };
            }
            _ => return path.to_path_buf(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_stay_under_the_root() {
        let scratch = tempfile::tempdir().unwrap();
        let root = scratch.path().join("root");
        std::fs::create_dir(&root).unwrap();
        let root_text = root.to_str().unwrap();
        assert_eq!(output_directory(root_text, "a/b").unwrap(), root.join("a/b"));
        let inside = format!("{root_text}/a");
        assert_eq!(output_directory(root_text, &inside).unwrap(), root.join("a"));
        for outside in ["../x", "a/../../x", "/etc", "", &format!("{root_text}2/x")] {
            assert!(output_directory(root_text, outside).is_err(), "{outside:?}");
        }
        let refused = checkpoint_directory(root_text, "/srv/ckpt").unwrap_err();
        assert!(
            refused.message.starts_with("checkpoint.location: "),
            "{refused:?}"
        );
        // A link that leads out of the root is followed before the comparison.
        std::os::unix::fs::symlink("/etc", root.join("link")).unwrap();
        assert!(output_directory(root_text, "link/x").is_err());
    }

    #[test]
    fn without_a_root_a_job_may_write_where_it_says() {
        assert_eq!(output_directory("", "a").unwrap(), PathBuf::from("a"));
        assert_eq!(output_directory("", "/tmp/a").unwrap(), PathBuf::from("/tmp/a"));
        assert!(output_directory("", "../a").is_err());
    }
}
