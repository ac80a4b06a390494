//! A cluster whose every connection has TLS: who shows a certificate of the right authority trains, nobody else does
//! anything.

use anyhow::{Result, ensure};
use arcface_tests::{
    Certificates, Cluster, Finished, JobFile, Options, Process, command,
    wait::{self, Seen},
};
use nix::sys::signal::Signal;
use std::time::Duration;

const TRAINED: Duration = Duration::from_secs(240);
const SOON: Duration = Duration::from_secs(30);

/// Ranks get their certificates from the agent, also those of the generation after a failure.
#[test]
fn a_job_trains_and_recovers_over_tls() -> Result<()> {
    Cluster::run_with_certificates(Options::default(), |cluster| {
        let job = JobFile {
            checkpoint_steps: 4,
            ..JobFile::tiny("secret").epochs(10)
        };
        let id = cluster.submit(&job)?;
        cluster.wait_for_job(&id, "to have a checkpoint", TRAINED, |job| {
            job["checkpoint_step"].as_u64() >= Some(4)
        })?;
        let ranks = cluster.rank_pids(&id)?;
        cluster.signal(ranks[1].1, Signal::SIGKILL)?;
        let job = cluster.wait_for_state(&id, "succeeded", TRAINED)?;
        ensure!(job["generation"] == 2 && job["step"] == 40, "{job}");
        Ok(())
    })
}

#[test]
fn who_has_no_certificate_of_the_authority_gets_no_answer() -> Result<()> {
    let one = Options { workers: 1, slots: 1 };
    Cluster::run_with_certificates(one, |cluster| {
        let certificates = cluster.certificates()?;
        let ca = (
            "ARCFACE_TLS_CA".to_owned(),
            certificates.cert("ca").display().to_string(),
        );
        let mut other_ca = certificates.environment("client");
        other_ca[0].1 = certificates.cert("other-ca").display().to_string();
        for (who, environment) in [
            ("without TLS", Vec::new()),
            ("without a certificate", vec![ca]),
            ("a stranger", certificates.environment("stranger")),
            ("one who trusts another authority", other_ca),
        ] {
            let mut client = command("arcface-coordinator", cluster.scratch())?;
            client
                .args(["nodes", "--coordinator", cluster.address()])
                .envs(environment.clone());
            let refused = Finished::of(client, SOON)?.expect(4)?;
            ensure!(
                refused.stdout.is_empty()
                    && refused.stderr.starts_with("error: cannot reach the coordinator")
                    && refused.stderr.contains("--tls-ca"),
                "{who}: {}",
                refused.stderr
            );

            let mut agent = command("arcface-worker", cluster.scratch())?;
            agent
                .args([
                    "--join",
                    cluster.address(),
                    "--device",
                    "cpu",
                    "--node-id",
                    "intruder",
                ])
                .envs(environment);
            let intruder = Process::start("intruder", &cluster.scratch().join("logs"), agent)?;
            wait::until("the agent to say why it has not joined", SOON, || {
                Ok(match intruder.output().contains("not joined") {
                    true => Seen::Yes(()),
                    false => Seen::NotYet(intruder.output()),
                })
            })?;
            let nodes = cluster.json(&["nodes"])?;
            ensure!(!nodes.to_string().contains("intruder"), "{who}: {nodes}");
        }
        Ok(())
    })
}

/// One clear line for each mistake with the files, before anything is served.
#[test]
fn files_that_do_not_fit_are_refused_at_the_start() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let certificates = Certificates::make()?;
    let file = |path: std::path::PathBuf| path.display().to_string();
    let (cert, key) = (
        file(certificates.cert("server")),
        file(certificates.key("server")),
    );
    let (other_key, missing) = (
        file(certificates.key("client")),
        file(scratch.path().join("none.pem")),
    );
    for (arguments, code, words) in [
        (vec!["--tls-cert", &cert], 2, "without its key"),
        (
            vec!["--tls-client-ca", &cert],
            2,
            "no certificate of the server's own",
        ),
        (
            vec!["--tls-cert", &key, "--tls-key", &cert],
            2,
            "no PEM certificate",
        ),
        (
            vec!["--tls-cert", &cert, "--tls-key", &other_key],
            2,
            "does the key belong",
        ),
        (vec!["--tls-cert", &missing, "--tls-key", &key], 3, "none.pem"),
        (vec!["--store", "etcd:https://127.0.0.1:1"], 2, "--etcd-ca"),
        (
            vec!["--store", "etcd:http://127.0.0.1:1", "--etcd-ca", &cert],
            2,
            "https://",
        ),
    ] {
        let mut serve = command("arcface-coordinator", scratch.path())?;
        serve
            .args(["serve", "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"])
            .args(&arguments);
        if !arguments.contains(&"--store") {
            serve.args(["--store", "embedded:store"]);
        }
        let refused = Finished::of(serve, SOON)?.expect(code)?;
        ensure!(
            refused.stderr.contains(words),
            "{arguments:?}: {}",
            refused.stderr
        );
    }
    Ok(())
}
