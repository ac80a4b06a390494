//! A Python client that knows nothing but the address drives the coordinator through server reflection.

use anyhow::{Context, Result, bail, ensure};
use arcface_tests::{Cluster, Finished, Options, workspace};
use serde_json::{Value, json};
use std::{process::Command, time::Duration};

/// `scripts/python.sh` ends with this if the packages are not there (EX_UNAVAILABLE).
const NO_PACKAGES: i32 = 69;

#[test]
fn a_python_client_submits_a_job_through_reflection_alone() -> Result<()> {
    let nobody = Options { workers: 0, slots: 1 };
    Cluster::run(nobody, |cluster| {
        let job = json!({
            "output": "out/python",
            "model": {"network": "tiny"},
            "head": {"num_classes": 10},
            "data": {"rec": "synthetic", "num_image": 100},
        });
        let mut command = Command::new(workspace().join("scripts/python.sh"));
        command
            .arg(workspace().join("tests/python/reflection_client.py"))
            .arg(cluster.address())
            .arg(job.to_string())
            .current_dir(cluster.scratch());
        let finished = Finished::of(command, Duration::from_secs(120))?;
        if finished.code == NO_PACKAGES {
            if std::env::var_os("CI").is_some() {
                bail!("the Python gRPC packages are missing: {}", finished.stderr);
            }
            eprintln!(
                "SKIPPED: the Python client was not run: {}",
                finished.stderr.trim()
            );
            return Ok(());
        }
        let finished = finished.expect(0)?;
        let seen: Value = serde_json::from_str(&finished.stdout).with_context(|| format!("{finished:?}"))?;

        let services: Vec<_> = seen["services"].as_array().into_iter().flatten().collect();
        for service in [
            "arcface.v1.ClusterService",
            "arcface.v1.JobService",
            "arcface.v1.RankService",
            "arcface.v1.WorkerService",
            "grpc.health.v1.Health",
        ] {
            ensure!(
                services.iter().any(|seen| *seen == service),
                "{service} is not listed: {seen}"
            );
        }
        ensure!(seen["health"]["status"] == "SERVING", "{seen}");
        ensure!(seen["refused"]["code"] == "INVALID_ARGUMENT", "{seen}");
        ensure!(
            seen["first_event"] == "job",
            "a watch begins with a snapshot: {seen}"
        );
        let id = seen["job_id"].as_str().context("a job id")?;
        ensure!(seen["jobs"] == json!([id]), "{seen}");
        let job = cluster.wait_for_state(id, "cancelled", Duration::from_secs(30))?;
        ensure!(job["spec"]["data"]["rec"] == "synthetic", "{job}");
        Ok(())
    })
}
