//! Following a job through the built binary, against a coordinator that plays a script: what is printed where, what
//! happens when the connection is lost, and the exit code.

use arcface_coordinator::api::Router;
use arcface_proto::v1::job_service_server::{JobService, JobServiceServer};
use arcface_proto::v1::watch_job_response::Event;
use arcface_proto::v1::{self, JobState};
use arcface_proto::{failure::ExitCode, timestamp::from_unix_ms};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

const ID: &str = "job-0123456789ab";

/// What one attachment sees, and whether the stream then stays open.
struct Attachment {
    events: Vec<Event>,
    stays_open: bool,
}

/// Plays one attachment after another; submits are answered with the job, or refused.
struct Script {
    attachments: Mutex<VecDeque<Attachment>>,
    evaluations: Vec<v1::Evaluation>,
}

type Events = std::pin::Pin<Box<dyn Stream<Item = Result<v1::WatchJobResponse, Status>> + Send>>;

#[tonic::async_trait]
impl JobService for Script {
    async fn submit_job(
        &self,
        request: Request<v1::SubmitJobRequest>,
    ) -> Result<Response<v1::SubmitJobResponse>, Status> {
        let request = request.into_inner();
        if request.request_id == "refused" {
            let details = ErrorDetails::with_bad_request(vec![
                FieldViolation::new("data.rec", "/d is not there"),
                FieldViolation::new(
                    "head.num_classes",
                    "5 is not the data set's 7 (hint: leave it out)",
                ),
            ]);
            return Err(Status::with_error_details(
                tonic::Code::InvalidArgument,
                "2 bad fields",
                details,
            ));
        }
        Ok(Response::new(v1::SubmitJobResponse {
            job: Some(job(JobState::Queued)),
        }))
    }

    async fn get_job(
        &self,
        request: Request<v1::GetJobRequest>,
    ) -> Result<Response<v1::GetJobResponse>, Status> {
        let id = request.into_inner().job_id;
        if !ID.starts_with(&id) {
            return Err(Status::not_found(format!("job {id}: there is no such job")));
        }
        Ok(Response::new(v1::GetJobResponse {
            job: Some(job(JobState::Running)),
        }))
    }

    async fn list_jobs(
        &self,
        _: Request<v1::ListJobsRequest>,
    ) -> Result<Response<v1::ListJobsResponse>, Status> {
        Err(Status::permission_denied("not for you"))
    }

    async fn cancel_job(
        &self,
        _: Request<v1::CancelJobRequest>,
    ) -> Result<Response<v1::CancelJobResponse>, Status> {
        Ok(Response::new(v1::CancelJobResponse {
            job: Some(job(JobState::Cancelling)),
        }))
    }

    type WatchJobStream = Events;

    async fn watch_job(&self, request: Request<v1::WatchJobRequest>) -> Result<Response<Events>, Status> {
        assert_eq!(request.into_inner().job_id, ID, "a watch asks for the whole id");
        let next = self.attachments.lock().expect("script").pop_front();
        let Attachment { events, stays_open } = next.ok_or_else(|| Status::internal("the script is over"))?;
        let events = tokio_stream::iter(events.into_iter().enumerate().map(|(i, event)| {
            let at = Some(from_unix_ms(1_795_000_000_000 + 10_000 * i as u64));
            Ok(v1::WatchJobResponse {
                at,
                event: Some(event),
            })
        }));
        Ok(Response::new(match stays_open {
            true => Box::pin(events.chain(tokio_stream::pending())),
            false => Box::pin(events),
        }))
    }

    async fn list_checkpoints(
        &self,
        _: Request<v1::ListCheckpointsRequest>,
    ) -> Result<Response<v1::ListCheckpointsResponse>, Status> {
        Ok(Response::new(v1::ListCheckpointsResponse::default()))
    }

    async fn list_evaluations(
        &self,
        request: Request<v1::ListEvaluationsRequest>,
    ) -> Result<Response<v1::ListEvaluationsResponse>, Status> {
        // Two pages, so that a client that reads only the first is seen.
        let second = request.into_inner().page_token == "second";
        let half = self.evaluations.len() / 2;
        let (evaluations, token) = match second {
            true => (&self.evaluations[half..], ""),
            false => (&self.evaluations[..half], "second"),
        };
        Ok(Response::new(v1::ListEvaluationsResponse {
            evaluations: evaluations.to_vec(),
            next_page_token: token.into(),
        }))
    }
}

fn job(state: JobState) -> v1::Job {
    v1::Job {
        id: ID.into(),
        state: state.into(),
        generation: 1,
        world_size: 2,
        step: 40,
        total_steps: 40,
        started_at: Some(from_unix_ms(1_795_000_000_000)),
        ended_at: Some(from_unix_ms(1_795_000_065_000)),
        ..Default::default()
    }
}

fn metrics(step: u64) -> Event {
    Event::Metrics(v1::StepMetrics {
        step,
        total_steps: 40,
        epoch: 1,
        loss: 12.3456,
        learning_rate: 0.095,
        samples_per_second: 185.4,
        eta_seconds: 20.0,
        ..Default::default()
    })
}

fn evaluation(dataset: &str, step: u64, accuracy: f64) -> v1::Evaluation {
    v1::Evaluation {
        dataset: dataset.into(),
        step,
        generation: 1,
        pairs: 600,
        accuracy,
        xnorm: 11.5,
        ..Default::default()
    }
}

fn recovery(done: bool) -> v1::Recovery {
    v1::Recovery {
        reason: "rank 1 on node-2 was killed by signal 9".into(),
        kind: "crash".into(),
        from_generation: 1,
        detected_s: 0.84,
        resumed_step: done.then_some(20),
        lost_steps: done.then_some(4),
        total_s: done.then_some(8.31),
        detected_at: None,
        from_memory: false,
    }
}

/// Starts a coordinator that plays the script; gives its address. It ends with the runtime.
async fn play(attachments: Vec<Attachment>, evaluations: Vec<v1::Evaluation>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address").to_string();
    let script = Script {
        attachments: Mutex::new(attachments.into()),
        evaluations,
    };
    tokio::spawn(async move {
        tonic::transport::Server::builder()
            .serve_with_incoming(
                Router::default().with(JobServiceServer::new(script)),
                TcpListenerStream::new(listener),
            )
            .await
            .expect("serve");
    });
    address
}

fn arcface(arguments: &[&str], address: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_arcface-coordinator"));
    command
        .args(arguments)
        .env("ARCFACE_COORDINATOR", address)
        .stdin(Stdio::null());
    command
}

/// Exit code, standard output, standard error.
async fn run(arguments: &[&str], address: &str) -> (i32, String, String) {
    let mut command = arcface(arguments, address);
    let output = tokio::task::spawn_blocking(move || command.output().expect("start"))
        .await
        .expect("join");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    (
        output.status.code().expect("not killed"),
        text(output.stdout),
        text(output.stderr),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_survives_a_restart_of_the_coordinator_and_ends_with_the_accuracy() {
    let before = vec![
        Event::Job(job(JobState::Running)),
        metrics(10),
        Event::Recovery(recovery(false)),
        Event::Evaluation(evaluation("lfw", 20, 0.5)),
    ];
    let mut recovered = job(JobState::Running);
    recovered.recoveries = vec![recovery(true)];
    let mut ended = job(JobState::Succeeded);
    ended.recoveries = recovered.recoveries.clone();
    let after = vec![
        Event::Job(recovered),
        Event::Evaluation(evaluation("lfw", 40, 0.95)),
        metrics(40),
        Event::Job(ended),
    ];
    let evaluations = vec![
        evaluation("lfw", 20, 0.5),
        evaluation("lfw", 40, 0.95),
        evaluation("cfp_fp", 40, 0.9),
    ];
    let attachments = vec![
        Attachment {
            events: before,
            stays_open: false,
        },
        Attachment {
            events: after,
            stays_open: true,
        },
    ];
    let address = play(attachments, evaluations).await;
    let (code, stdout, stderr) = run(&["watch", "job-01"], &address).await;
    assert_eq!(
        (code, stdout.as_str()),
        (0, "final accuracy 0.9250\n"),
        "{stderr}"
    );
    let expected = format!(
        "\
step     40  lfw  accuracy 0.9500 +- 0.0000  xnorm 11.50
step     40  cfp_fp  accuracy 0.9000 +- 0.0000  xnorm 11.50
running: 2 ranks, generation 1
step     10/40  epoch 2  loss 12.346  lr 0.095  185 samples/s  eta 20s
rank 1 on node-2 was killed by signal 9: detected after 0.8 s, recovering
step     20  lfw  accuracy 0.5000 +- 0.0000  xnorm 11.50
lost the coordinator at {address} (it closed the connection); the job goes on, trying again
found the coordinator again
rank 1 on node-2 was killed by signal 9: detected after 0.8 s, resumed from step 20, 4 steps lost, back after 8.3 s
step     40/40  epoch 2  loss 12.346  lr 0.095  185 samples/s
job {ID} succeeded: 40 steps in 1m 05s
"
    );
    assert_eq!(stderr, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_job_is_1_with_its_reason() {
    let mut failed = job(JobState::Failed);
    failed.reason = "rank 0 ended 11 times: data.rec /d: no such folder".into();
    let attachments = vec![Attachment {
        events: vec![Event::Job(failed)],
        stays_open: false,
    }];
    let address = play(attachments, Vec::new()).await;
    let (code, stdout, stderr) = run(&["watch", ID], &address).await;
    assert_eq!((code, stdout.as_str()), (ExitCode::Failed as i32, ""));
    assert_eq!(
        stderr,
        format!(
            "error: job {ID} failed: rank 0 ended 11 times: data.rec /d: no such folder\n\
             hint: arcface-coordinator job {ID} --coordinator {address}\n"
        )
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_detaches_and_says_how_to_attach_again() {
    let events = vec![Event::Job(job(JobState::Running))];
    let address = play(
        vec![Attachment {
            events,
            stays_open: true,
        }],
        Vec::new(),
    )
    .await;
    let mut child = arcface(&["watch", ID], &address)
        .stderr(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("start");
    let (code, stderr) = tokio::task::spawn_blocking(move || {
        let mut stderr = BufReader::new(child.stderr.take().expect("piped"));
        let mut text = String::new();
        stderr.read_line(&mut text).expect("attached");
        kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).expect("interrupt");
        stderr.read_to_string(&mut text).expect("read");
        (child.wait().expect("wait").code(), text)
    })
    .await
    .expect("join");
    assert_eq!(code, Some(ExitCode::Detached as i32), "{stderr}");
    let expected = format!("arcface-coordinator watch {ID} --coordinator {address}\n");
    assert!(
        stderr.starts_with("running") && stderr.ends_with(&expected),
        "{stderr}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn events_in_json_are_one_object_a_line() {
    let events = vec![
        Event::Job(job(JobState::Running)),
        metrics(10),
        Event::Job(job(JobState::Succeeded)),
    ];
    let address = play(
        vec![Attachment {
            events,
            stays_open: false,
        }],
        vec![evaluation("lfw", 40, 0.9)],
    )
    .await;
    let (code, stdout, _) = run(&["watch", ID, "--output", "json"], &address).await;
    let lines: Vec<serde_json::Value> = stdout
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    let names: Vec<_> = lines
        .iter()
        .map(|line| line["event"].as_str().expect("event"))
        .collect();
    assert_eq!(
        (code, names.as_slice()),
        (0, ["job", "metrics", "job"].as_slice())
    );
    assert_eq!(
        (&lines[1]["metrics"]["step"], &lines[2]["job"]["state"]),
        (&10.into(), &"succeeded".into())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_have_their_exit_codes() {
    let address = play(
        Vec::new(),
        vec![evaluation("lfw", 20, 0.5), evaluation("lfw", 40, 0.9)],
    )
    .await;
    let (code, _, stderr) = run(&["job", "job-ffff"], &address).await;
    assert_eq!(
        (code, stderr.lines().next()),
        (3, Some("error: job job-ffff: there is no such job"))
    );

    let (code, _, stderr) = run(&["jobs"], &address).await;
    assert_eq!((code, stderr.as_str()), (4, "error: not for you\n"));

    let (code, _, stderr) = run(&["nodes"], &address).await;
    assert_eq!(
        (
            code,
            stderr.contains("hint: is there a coordinator of this version")
        ),
        (4, true),
        "{stderr}"
    );

    let folder = tempfile::TempDir::new().expect("scratch");
    let file = folder.path().join("job.toml");
    std::fs::write(
        &file,
        "output = \"o\"\n[model]\nnetwork = \"r18\"\n[data]\nrec = \"/d\"\n",
    )
    .expect("write");
    let file = file.to_str().expect("UTF-8");
    let (code, stdout, stderr) = run(&["submit", file, "--request-id", "refused"], &address).await;
    assert_eq!((code, stdout.as_str()), (2, ""));
    assert_eq!(
        stderr,
        "error: data.rec: /d is not there\nerror: head.num_classes: 5 is not the data set's 7\nhint: leave it out\n"
    );

    let (code, stdout, _) = run(&["submit", file], &address).await;
    assert_eq!((code, stdout), (0, format!("{ID}\n")));

    let (code, stdout, _) = run(&["evals", ID, "--output", "json"], &address).await;
    let evaluations: serde_json::Value = serde_json::from_str(&stdout).expect("JSON");
    assert_eq!((code, evaluations.as_array().map(Vec::len)), (0, Some(2)));
    assert_eq!(evaluations[1]["accuracy"], 0.9);
}
