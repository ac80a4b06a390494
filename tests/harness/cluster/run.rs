//! How a test gets its cluster, with what it wants around it, and what becomes of both in the end.

use super::{Cluster, Options, Seat};
use crate::{Certificates, Etcd, Network};
use anyhow::Result;
use std::{
    ffi::OsString,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{Mutex, PoisonError},
};

/// Clusters of one test executable run one after the other: each wants the whole (small) machine.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// What a cluster has around it.
#[derive(Default)]
struct Surroundings {
    /// Where several coordinators keep their state.
    etcd: Option<Etcd>,
    /// Where the workers live.
    network: Option<Network>,
    /// What coordinators and workers are started with.
    environment: Vec<(String, String)>,
    /// All connections have TLS, and both ends show a certificate.
    certificates: Option<Certificates>,
}

impl Cluster {
    /// Starts a cluster, waits until its workers are there, and gives it to a test. If the test fails, every log of
    /// every process is printed.
    ///
    /// # Errors
    /// What the test or the start failed with.
    pub fn run(options: Options, test: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        Self::run_with(options, 1, Surroundings::default(), test)
    }

    /// The same with every worker in a network namespace of its own. Where there are none the test is skipped, see
    /// [`Network::start`].
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_in_network(options: Options, test: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        match Network::start()? {
            Some(network) => {
                let around = Surroundings {
                    network: Some(network),
                    ..Surroundings::default()
                };
                Self::run_with(options, 1, around, test)
            }
            None => Ok(()),
        }
    }

    /// The same with these variables in the environment of the coordinator and the workers.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_in_environment(
        options: Options,
        environment: Vec<(String, String)>,
        test: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let around = Surroundings {
            environment,
            ..Surroundings::default()
        };
        Self::run_with(options, 1, around, test)
    }

    /// The same with several coordinators that keep their state in an etcd of this test. Where no etcd is installed
    /// the test is skipped, see [`Etcd::start`].
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_on_etcd(
        options: Options,
        coordinators: usize,
        test: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        match Etcd::start()? {
            Some(etcd) => {
                let around = Surroundings {
                    etcd: Some(etcd),
                    ..Surroundings::default()
                };
                Self::run_with(options, coordinators, around, test)
            }
            None => Ok(()),
        }
    }

    /// The same with TLS on all connections to the coordinator and to etcd, and a certificate on both ends of each.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_with_certificates(options: Options, test: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let certificates = Certificates::make()?;
        let files = [
            ("--trusted-ca-file", certificates.cert("ca")),
            ("--cert-file", certificates.cert("server")),
            ("--key-file", certificates.key("server")),
        ];
        let mut arguments: Vec<OsString> = vec!["--client-cert-auth".into()];
        arguments.extend(
            files
                .into_iter()
                .flat_map(|(flag, file)| [flag.into(), file.into()]),
        );
        match Etcd::start_with("https", arguments)? {
            Some(etcd) => {
                let around = Surroundings {
                    etcd: Some(etcd),
                    environment: certificates.environment("client"),
                    certificates: Some(certificates),
                    ..Surroundings::default()
                };
                Self::run_with(options, 1, around, test)
            }
            None => Ok(()),
        }
    }

    fn run_with(
        options: Options,
        coordinators: usize,
        around: Surroundings,
        test: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let host = around
            .network
            .as_ref()
            .map_or("127.0.0.1".to_owned(), |network| network.host().to_string());
        let seat = || Seat {
            process: None,
            address: format!("{host}:0"),
        };
        let mut cluster = Self {
            scratch: tempfile::tempdir()?,
            coordinators: std::iter::repeat_with(seat).take(coordinators).collect(),
            workers: Vec::new(),
            past: Vec::new(),
            slots: options.slots,
            etcd: around.etcd,
            network: around.network,
            environment: around.environment,
            certificates: around.certificates,
        };
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            for index in 0..coordinators {
                cluster.start_coordinator_at(index)?;
            }
            for _ in 0..options.workers {
                cluster.start_worker()?;
            }
            cluster.wait_for_nodes(options.workers)?;
            test(&mut cluster)?;
            cluster.check_no_panic()
        }));
        if !matches!(outcome, Ok(Ok(()))) {
            cluster.print_logs();
        }
        outcome.unwrap_or_else(|panic| resume_unwind(panic))
    }
}
