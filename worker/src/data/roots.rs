//! Which folders a job may read. A job file comes over the network: with `--data-root`, its paths stay inside.

use std::path::{Path, PathBuf};

use super::error::DataError;

/// The file or folder that a job names. Without roots the path is taken as it is. With roots a relative path is looked
/// for in each root in order, and what is found, links resolved, must lie inside one of the roots.
pub fn resolve(path: &str, data_roots: &[PathBuf]) -> Result<PathBuf, DataError> {
    let wanted = Path::new(path);
    if data_roots.is_empty() {
        wanted.metadata().map_err(|e| DataError::io(wanted, e))?;
        return Ok(wanted.into());
    }
    let candidates: Vec<PathBuf> = match wanted.is_absolute() {
        true => vec![wanted.into()],
        false => data_roots.iter().map(|root| root.join(wanted)).collect(),
    };
    let outside = || DataError::OutsideRoots {
        path: wanted.into(),
        roots: data_roots
            .iter()
            .map(|root| root.display().to_string())
            .collect::<Vec<_>>()
            .join(", "),
    };
    let roots: Vec<PathBuf> = data_roots
        .iter()
        .filter_map(|root| root.canonicalize().ok())
        .collect();
    for candidate in &candidates {
        if let Ok(found) = candidate.canonicalize() {
            return match roots.iter().any(|root| found.starts_with(root)) {
                true => Ok(found),
                false => Err(outside()),
            };
        }
    }
    // An absolute path elsewhere is refused alike whether it exists or not.
    match wanted.is_absolute() && !data_roots.iter().any(|root| wanted.starts_with(root)) {
        true => Err(outside()),
        false => Err(DataError::NotFound {
            path: candidates.into_iter().next().unwrap_or_else(|| wanted.into()),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn paths_stay_inside_the_roots() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        for folder in [a.join("set"), b.join("other"), dir.path().join("secret")] {
            fs::create_dir_all(folder).unwrap();
        }
        std::os::unix::fs::symlink(dir.path().join("secret"), a.join("link")).unwrap();
        let roots = [a.clone(), b.clone()];
        let canonical = |path: PathBuf| path.canonicalize().unwrap();
        assert_eq!(resolve("set", &roots).unwrap(), canonical(a.join("set")));
        assert_eq!(resolve("other", &roots).unwrap(), canonical(b.join("other")));
        let absolute = b.join("other");
        assert_eq!(
            resolve(absolute.to_str().unwrap(), &roots).unwrap(),
            canonical(absolute)
        );
        for path in ["../secret", "link", "/etc", "/nowhere/at/all"] {
            let error = resolve(path, &roots).unwrap_err();
            assert!(matches!(error, DataError::OutsideRoots { .. }), "{path}: {error}");
        }
        assert!(matches!(
            resolve("absent", &roots).unwrap_err(),
            DataError::NotFound { .. }
        ));
        assert!(matches!(
            resolve("/nowhere/at/all", &[]).unwrap_err(),
            DataError::NotFound { .. }
        ));
    }
}
