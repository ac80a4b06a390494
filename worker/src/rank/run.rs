//! The life of a rank process: settings, data and network, rendezvous, communicator, the newest checkpoint, training,
//! the last word. Every failure is one line, told to the coordinator before the process ends.

use super::checkpoints::{self, Writer};
use super::evaluate::targets::Target;
use super::failure::RankFailure;
use super::figures;
use super::log::TrainingLog;
use super::meeting::{agree, communicator, meet};
use super::memory::{Account, out_of_memory};
use super::outputs;
use super::phases::Together;
use super::report::Reporter;
use super::same_data::check_as_before;
use super::setup::{Job, Prepared};
use super::spans::Spans;
use super::train::{Outside, Sinks, train};
use super::watched::Watched;
use crate::channel::ClientTls;
use crate::checkpoint::location::Remote;
use crate::checkpoint::{Checkpoint, Location};
use crate::device::{self, Placement};
use crate::paths;
use crate::progress::{Activity, Board};
use arcface_proto::convert::job_spec;
use arcface_proto::failure::Failure;
use arcface_proto::location::{Scheme, StoreUrl};
use arcface_proto::types::{ClassRange, JobId};
use arcface_proto::v1::report_request::Report;
use arcface_proto::v1::report_response::Command;
use arcface_proto::v1::{
    CommitCheckpointRequest, Evaluation, RankAssignment, RankId, RankPace, StepMetrics, TrainingFinished,
    TrainingStarted,
};
use std::cell::OnceCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};
use tracing::{info, warn};

/// How long a failing rank tries to say why: the process ends within two seconds of a peer's death.
const LAST_WORD_OF_FAILURE: Duration = Duration::from_millis(1500);
/// How long a rank that trained to the end waits for a coordinator that is away, to commit and to say so.
const LAST_WORD: Duration = Duration::from_secs(300);
/// How long rank 0 waits for the manifest of the last checkpoint, once it is committed.
const LAST_COMMIT: Duration = Duration::from_secs(10);

/// Trains as assigned; returns when everything was said. `board` shows the agent what it does.
///
/// # Errors
/// Whatever ended the training before its end; the coordinator was told, if it could be reached.
pub fn run(assignment: RankAssignment, tls: ClientTls, board: &Board) -> anyhow::Result<()> {
    let threads = device::threads_of_rank(assignment.local_world_size);
    tch::set_num_threads(i32::try_from(threads).unwrap_or(1));
    let id = RankId {
        job_id: assignment.job_id.clone(),
        generation: assignment.generation,
        rank: assignment.rank,
    };
    let mut reporter = Reporter::start(id, assignment.coordinators.clone(), tls).map_err(Failure::from)?;
    let account = OnceCell::new();
    let worked = catch_unwind(AssertUnwindSafe(|| {
        work(&assignment, &mut reporter, board, &account)
    }));
    let worked = worked.unwrap_or_else(|panic| match out_of_memory(panic.as_ref(), account.get()) {
        Some(failure) => Err(failure),
        None => resume_unwind(panic),
    });
    board.enter(Activity::Finishing);
    match worked {
        Ok(finished) => {
            if !reporter.finish(Report::Finished(finished), LAST_WORD) {
                warn!("the coordinator did not hear of the end of the training");
            }
            Ok(())
        }
        Err(failure) => {
            reporter.finish(Report::Error(failure.to_wire()), LAST_WORD_OF_FAILURE);
            Err(Failure::from(failure).into())
        }
    }
}

fn work(
    assignment: &RankAssignment,
    reporter: &mut Reporter,
    board: &Board,
    account: &OnceCell<Account>,
) -> Result<TrainingFinished, RankFailure> {
    let (rank, world_size) = (assignment.rank, assignment.world_size);
    if world_size == 0 || rank >= world_size {
        return Err(RankFailure::permanent(format!(
            "assignment: rank {rank} is not in a world of {world_size}"
        )));
    }
    let spec = assignment
        .spec
        .as_ref()
        .map(job_spec)
        .transpose()
        .map_err(|violations| {
            let all: Vec<String> = violations.iter().map(ToString::to_string).collect();
            RankFailure::permanent(all.join("; "))
        })?;
    let mut spec = spec.ok_or_else(|| RankFailure::permanent("assignment: it has no job"))?;
    if assignment.resume.is_some() {
        // The checkpoint has all weights. What the first generation started from may be gone by now.
        spec.model.init = None;
        spec.head.init = None;
    }
    let output = paths::output_directory(&assignment.output_root, &spec.output)
        .map_err(|refused| RankFailure::permanent(refused.message).hint(refused.hint))?;
    outputs::make_directory(&output)?;
    let location = match &spec.checkpoint.location {
        Some(url) => shared_location(assignment, url)?,
        None => Location::output(&output),
    };
    let data_roots: Vec<PathBuf> = assignment.data_roots.iter().map(PathBuf::from).collect();

    let spans = Spans::of(assignment);
    let placement = Placement::open(&assignment.device, spec.train.precision).map_err(|refused| {
        RankFailure::permanent(format!("device {}: {}", assignment.device, refused.message))
            .hint(refused.hint)
    })?;
    if let Some(gpu) = placement.gpu() {
        info!("computes on {gpu}");
    }
    let prepared = spans.during("load data", || Prepared::open(spec, &data_roots, placement))?;
    if rank == 0 {
        prepared.targets.iter().try_for_each(Target::check)?;
    }
    info!("{} over {} ranks", prepared.dataset.describe(), world_size);
    if let Some(manifest) = &assignment.resume {
        check_as_before(prepared.dataset.as_ref(), manifest)?;
    }
    // Before the others are kept waiting.
    let flops_per_sample = (rank == 0).then(|| figures::flops_per_sample(&prepared.backbone));
    let begin = Instant::now();
    let checkpoint = match assignment.resume {
        Some(_) => spans.during("read checkpoint", || resumable(assignment, &location, board))?,
        None => None,
    };
    let mut restoring = begin.elapsed();
    board.enter(Activity::Starting);
    let met = spans.during("rendezvous", || {
        meet(assignment, reporter, prepared.spec.checkpoint.buddy_steps)
    })?;
    let loading = spans.begin("load");
    let together = Together::default();
    let comm = communicator(met.ring, &prepared.placement)?;
    let comm = Watched::new(comm, board.clone(), together.clone());
    let (mut trainer, mut job) = prepared.into_trainer(Box::new(comm))?;
    job.ranks_on_node = assignment.local_world_size;
    let begin = Instant::now();
    let checkpoint = match (&assignment.resume, &met.memory) {
        (Some(manifest), Some(memory)) if !assignment.resume_copies.is_empty() => {
            Some(memory.gather(manifest, assignment)?)
        }
        (Some(manifest), None) if !assignment.resume_copies.is_empty() => {
            let error = "a node keeps no copies in memory";
            return Err(RankFailure::copies(manifest, "", &error));
        }
        _ => checkpoint,
    };
    restoring += begin.elapsed();
    if let Some(known) = Account::of(&mut trainer) {
        // There is one trainer in a rank's life.
        let _set_once = account.set(known);
    }
    agree(trainer.comm.as_mut(), assignment.resume.as_ref())?;
    trainer.phases.show_on(board.clone());
    trainer.phases.know(together);
    trainer.settings.left_out.clone_from(&assignment.left_out_steps);
    let begin = Instant::now();
    let start = match &checkpoint {
        Some(checkpoint) => {
            let state = checkpoints::restore(&mut trainer, checkpoint, !assignment.resume_copies.is_empty())?;
            info!(
                step = state.step,
                "resumed from {}",
                checkpoint.manifest().directory
            );
            state.step
        }
        None => 0,
    };
    restoring += begin.elapsed();
    let restore_seconds = checkpoint.is_some().then_some(restoring.as_secs_f64());
    let in_store = checkpoint.filter(|_| assignment.resume_copies.is_empty());
    let resumed = in_store.map(|checkpoint| checkpoint.manifest().clone());
    // All ranks hold the same state before anyone says that training begins.
    trainer.comm.barrier()?;
    loading.end(SystemTime::now());
    reporter.say(Report::Started(TrainingStarted {
        step: start,
        total_steps: job.end_step,
        num_classes: job.num_classes,
        num_image: job.dataset.len(),
        from_memory: !assignment.resume_copies.is_empty(),
        restore_seconds,
    }));

    let log = match rank {
        0 => Some(begin_log(&output, assignment, start, &job)?),
        _ => None,
    };
    let committer = reporter.committer();
    let writes = spans.clone();
    let commit = move |request: CommitCheckpointRequest| {
        let seconds = request.persist_seconds.unwrap_or(0.0);
        let write = writes.took("write checkpoint", request.step, seconds);
        write.end(SystemTime::now());
        committer.commit(request);
    };
    let writer = Writer::start(location, assignment.generation, commit);
    if let (0, Some(manifest)) = (rank, resumed) {
        writer.resumed(manifest);
    }
    let mut sinks = Sinks {
        output,
        log,
        writer: Some(&writer),
        copier: met
            .memory
            .and_then(|memory| memory.copier(&job.spec, assignment, reporter)),
        flops_per_sample,
        outside: &mut Told {
            reporter,
            writer: &writer,
            rank,
            spans: &spans,
        },
    };
    let finished = train(&mut trainer, &job, start, &mut sinks);
    let log = sinks.log.take();
    let finished = finished?;
    board.enter(Activity::Finishing);
    conclude(reporter, writer, rank, finished.step, board);
    if let Some(mut log) = log {
        let TrainingFinished { step, reason } = &finished;
        let reason = match reason.as_str() {
            "" => String::new(),
            reason => format!(", {reason}"),
        };
        log.line(&format!("finished after step {step}{reason}"));
    }
    Ok(finished)
}

fn begin_log(
    output: &Path,
    assignment: &RankAssignment,
    start: u64,
    job: &Job,
) -> Result<TrainingLog, RankFailure> {
    let mut log = TrainingLog::open(output)?;
    if job.spec.train.tensorboard {
        log.draw(output, start);
    }
    log.line(&format!(
        "{} generation {}: training from step {start} to {} on {} ranks",
        assignment.job_id, assignment.generation, job.end_step, assignment.world_size
    ));
    Ok(log)
}

/// Where the job's checkpoints go, if it says so.
fn shared_location(assignment: &RankAssignment, url: &StoreUrl) -> Result<Location, RankFailure> {
    let job: JobId = assignment
        .job_id
        .parse()
        .map_err(|error| RankFailure::permanent(format!("assignment: {error}")))?;
    if url.scheme() == Scheme::File {
        let dir = paths::checkpoint_directory(&assignment.output_root, url.path())
            .map_err(|refused| RankFailure::permanent(refused.message).hint(refused.hint))?;
        return Ok(Location::shared(&dir, &job));
    }
    let location = Remote::open(url).map(|store| Location::remote(store, &job));
    let asked = location.and_then(|location| {
        location.check()?;
        info!("checkpoints go to {location}");
        Ok(location)
    });
    asked.map_err(|error| RankFailure::transient(format!("checkpoint.location: {error}")).hint(error.hint()))
}

/// The checkpoint to resume from, after everything that this rank will read of it was compared with its digests. That is
/// done before the ranks meet: where one of them finds damage, none has used a byte, and the next generation goes back to
/// the checkpoint before.
fn resumable(
    assignment: &RankAssignment,
    location: &Location,
    board: &Board,
) -> Result<Option<Checkpoint>, RankFailure> {
    let resume = assignment
        .resume
        .as_ref()
        .filter(|_| assignment.resume_copies.is_empty());
    let Some(manifest) = resume else {
        return Ok(None);
    };
    let classes = ClassRange::of_rank(manifest.num_classes, assignment.rank, assignment.world_size);
    // A fetch may take longer than a start: as long as bytes come in, the rank does not hang.
    let alive = || board.enter(Activity::Starting);
    location
        .open(manifest, classes, &alive)
        .map(Some)
        .map_err(|error| RankFailure::checkpoint(manifest, &error))
}

/// Waits until the last checkpoint is durable, committed and described. Every rank does: a coordinator that dies before it has
/// heard of all parts has to be told of each again.
fn conclude(reporter: &mut Reporter, writer: Writer, rank: u32, step: u64, board: &Board) {
    let failures = writer.failures().clone();
    // It may be long, on a slow disk or a thin line: as long as bytes move, the rank does not hang.
    let location = writer.finish(&|| board.enter(Activity::Finishing));
    if !reporter.wait_for_commits(LAST_WORD) {
        warn!("the last checkpoint was not committed: the coordinator is away, or a peer still writes");
        return;
    }
    // Only rank 0 keeps the directory; the others have nothing to wait for.
    if rank != 0 {
        return;
    }
    let deadline = Instant::now() + LAST_COMMIT;
    while let Some(command) = reporter.command_within(deadline.saturating_duration_since(Instant::now())) {
        let Command::CheckpointCommitted(committed) = command else {
            continue;
        };
        checkpoints::settle(&location, &committed, &failures);
        if committed.manifest.is_some_and(|manifest| manifest.step >= step) {
            return;
        }
    }
}

/// The loop's reports, through gRPC.
struct Told<'a> {
    reporter: &'a mut Reporter,
    writer: &'a Writer,
    rank: u32,
    spans: &'a Spans,
}

impl Outside for Told<'_> {
    fn metrics(&mut self, metrics: StepMetrics) {
        self.reporter.say(Report::Metrics(metrics));
    }

    fn pace(&mut self, pace: RankPace) {
        self.reporter.say(Report::Pace(pace));
    }

    fn evaluation(&mut self, evaluation: Evaluation) {
        let span = self
            .spans
            .took("evaluation", evaluation.step, evaluation.seconds)
            .text("dataset", &evaluation.dataset);
        span.end(SystemTime::now());
        self.reporter.say(Report::Evaluation(evaluation));
    }

    fn evaluations(&mut self) -> Result<Vec<Evaluation>, RankFailure> {
        self.reporter.evaluations()
    }

    fn checkpoint_wanted(&mut self) -> bool {
        let mut wanted = false;
        while let Some(command) = self.reporter.command() {
            match command {
                Command::CheckpointNow(_) => wanted = true,
                Command::CheckpointCommitted(committed) if self.rank == 0 => {
                    self.writer.committed(committed);
                }
                Command::CheckpointCommitted(_) => {}
            }
        }
        wanted
    }
}
