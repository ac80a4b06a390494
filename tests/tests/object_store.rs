//! Checkpoints where the job file says: in an object store over HTTPS, through the real binaries, and in another directory.

use anyhow::{Context, Result, ensure};
use arcface_tests::{Cluster, JobFile, Options, S3};
use nix::sys::signal::Signal;
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

const TRAINED: Duration = Duration::from_secs(240);

fn job(name: &str, epochs: u32, location: &str) -> JobFile {
    JobFile {
        checkpoint_steps: 4,
        more: format!("keep = 2\nlocation = \"{location}\"\n"),
        ..JobFile::tiny(name).epochs(epochs)
    }
}

/// Every `manifest.json` below a folder.
fn manifests(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(manifests(&path)?);
        } else if path.ends_with("manifest.json") {
            found.push(path);
        }
    }
    Ok(found)
}

#[test]
fn a_killed_rank_resumes_from_an_object_store_and_nothing_is_in_the_output_directory() -> Result<()> {
    let server = S3::start_tls()?;
    Cluster::run_in_environment(Options::default(), server.environment(), |cluster| {
        let id = cluster.submit(&job("in_s3", 10, "s3://faces/runs/"))?;
        cluster.wait_for_job(&id, "to have a checkpoint", TRAINED, |job| {
            job["checkpoint_step"].as_u64() >= Some(4)
        })?;
        let ranks = cluster.rank_pids(&id)?;
        cluster.signal(ranks[1].1, Signal::SIGKILL)?;
        let job = cluster.wait_for_state(&id, "succeeded", TRAINED)?;
        ensure!(job["generation"] == 2 && job["step"] == 40, "{job}");
        ensure!(
            job["recoveries"][0]["resumed_step"].as_u64() >= Some(4),
            "it resumed from a checkpoint: {job}"
        );
        let listed = cluster.json(&["checkpoints", &id])?;
        let listed = listed.as_array().context("a list")?;
        ensure!(listed.len() == 2, "two are kept: {listed:?}");
        let mut kept = Vec::new();
        for one in listed {
            let url = one["url"].as_str().context("a URL")?;
            let name = url.strip_prefix("s3://faces/").context("in the bucket")?;
            ensure!(name.starts_with(&format!("runs/{id}/step-")), "{url}");
            kept.push(server.bucket().join(name).join("manifest.json"));
        }
        let mut found = manifests(&server.bucket())?;
        found.sort();
        kept.sort();
        ensure!(found == kept, "older ones were removed: {found:?}, {kept:?}");
        let output = cluster.scratch().join("out/in_s3");
        ensure!(
            output.join("model.safetensors").exists() && !output.join("checkpoints").exists(),
            "the output directory has the model and no checkpoints"
        );
        Ok(())
    })
}

#[test]
fn a_file_url_names_another_directory_and_a_bad_one_is_refused_at_submit() -> Result<()> {
    Cluster::run(Options::default(), |cluster| {
        let shared = cluster.scratch().join("shared");
        let file = job("in_files", 2, &format!("file://{}", shared.display()));
        let id = cluster.submit(&file)?;
        cluster.wait_for_state(&id, "succeeded", TRAINED)?;
        let found = manifests(&shared)?;
        ensure!(
            found.len() == 2 && found.iter().all(|path| path.starts_with(shared.join(&id))),
            "{found:?}"
        );
        let bad = job("bad", 2, "s3://key:SECRET@faces/runs").write(cluster.scratch())?;
        let refused = cluster.cli(&["submit", &bad.to_string_lossy()], TRAINED)?;
        ensure!(
            refused.code != 0
                && refused
                    .stderr
                    .contains("checkpoint.location: has user information")
                && refused.stderr.contains("hint: ")
                && !refused.stderr.contains("SECRET"),
            "{}",
            refused.stderr
        );
        Ok(())
    })
}
