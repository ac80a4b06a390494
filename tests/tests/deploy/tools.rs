//! Runs the tools behind `scripts/deploy_tools.sh`, and says so where they are not there.

use anyhow::{Context, Result, bail};
use arcface_tests::{Finished, workspace};
use serde_json::Value;
use std::{
    fs::{self, File},
    process::{Command, Stdio},
    time::Duration,
};

/// `scripts/deploy_tools.sh` ends with this if the tools have not been fetched (EX_UNAVAILABLE).
const NO_TOOLS: i32 = 69;

/// Runs a tool at the root of the source tree; `None` if the tools are not there, which is an error with `CI` set.
pub fn tool(arguments: &[&str], stdin: Option<&str>) -> Result<Option<Finished>> {
    let scratch = tempfile::tempdir()?;
    let input = match stdin {
        Some(text) => {
            let file = scratch.path().join("stdin");
            fs::write(&file, text)?;
            Stdio::from(File::open(file)?)
        }
        None => Stdio::null(),
    };
    let mut command = Command::new(workspace().join("scripts/deploy_tools.sh"));
    command
        .args(arguments)
        .current_dir(workspace())
        .stdin(input)
        // What a user's shell sets would be taken for the values of the compose file.
        .env_remove("ARCFACE_COORDINATOR")
        .env_remove("ARCFACE_WORKERS");
    let finished = Finished::of(command, Duration::from_secs(120))?;
    if finished.code == NO_TOOLS {
        skipped(arguments[0], finished.stderr.trim())?;
        return Ok(None);
    }
    Ok(Some(finished))
}

/// Says that a check was left out.
///
/// # Errors
/// With `CI` set, where nothing may be left out.
pub fn skipped(what: &str, why: &str) -> Result<()> {
    if std::env::var_os("CI").is_some() {
        bail!("{what} was not run: {why}");
    }
    eprintln!("SKIPPED: {what} was not run: {why}");
    Ok(())
}

/// The documents of a YAML file.
pub fn yaml(path: &str) -> Result<Option<Vec<Value>>> {
    let reader = ["python3", "-s", "tests/python/deploy_yaml.py", "parse", path];
    let Some(finished) = tool(&reader, None)? else {
        return Ok(None);
    };
    let read: Value = serde_json::from_str(&finished.expect(0)?.stdout)?;
    let documents = read[path].as_array().context("documents")?;
    Ok(Some(documents.clone()))
}

/// The texts of a list.
pub fn texts(list: &Value) -> Vec<&str> {
    list.as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect()
}
