//! What the coordinator makes of the counts that ranks tell, as a scrape shows it.

mod fakes;

use arcface_coordinator::exporter;
use arcface_proto::v1::{
    self, CollectiveFigures, FigureSum, FigureTimes, JobState, RankFigures, report_request::Report,
};
use fakes::{Cluster, Rank, generation, spec, training, within};

/// Waits until the page has a line.
async fn shows(line: &str) {
    let recorder = exporter::recorder().expect("the recorder");
    let seen = async {
        while !exporter::render(recorder).lines().any(|shown| shown == line) {
            tokio::task::yield_now().await;
        }
    };
    within(line, seen).await;
}

/// Counts of a rank after it has read so many images.
fn figures(samples: u64, cosines: f64) -> RankFigures {
    let times = |count: u64, seconds| {
        Some(FigureTimes {
            counts: vec![0, count],
            seconds: vec![0.0, seconds],
        })
    };
    let calls = |bytes| CollectiveFigures {
        times: times(samples / 10, 0.5),
        bytes,
    };
    RankFigures {
        classes: 10,
        shard_rows: 5,
        sampled_rows: 2,
        positive_rows: 1,
        target_cosines: Some(FigureSum {
            sum: cosines,
            count: 4,
        }),
        samples,
        sample_bytes: 100 * samples,
        queue_depth: 3,
        decode: times(samples, 0.25),
        collectives: [
            ("all_reduce".to_owned(), calls(64)),
            ("no such".to_owned(), calls(64)),
        ]
        .into(),
        checkpoint_failures: [("write".to_owned(), 1), ("no such".to_owned(), 9)].into(),
        gpu: Some(v1::RankGpu {
            index: 3,
            uuid: "GPU-7a5f-09".into(),
            allocated: 64,
            reserved: 128,
            peak: 96,
        }),
        ..Default::default()
    }
}

async fn tell(rank: &Rank, figures: RankFigures) {
    rank.report(Report::Pace(v1::RankPace {
        steps: 1,
        figures: Some(figures),
        ..Default::default()
    }))
    .await;
}

#[tokio::test]
async fn counts_of_ranks_are_added_up_and_end_with_their_generation() {
    let cluster = Cluster::start().await;
    let (id, mut a, mut b, zero, one) = training(&cluster, spec(2)).await;
    let of_job = |name: &str, value: &str| format!("{name}{{job_id=\"{id}\"}} {value}");
    let of = |name: &str, label: &str, value: &str| format!("{name}{{job_id=\"{id}\",{label}}} {value}");
    shows(&of("arcface_checkpoint_failures_total", "stage=\"write\"", "0")).await;

    tell(&zero, figures(20, 1.0)).await;
    tell(&one, figures(20, 3.0)).await;
    for line in [
        of_job("arcface_head_classes", "10"),
        of("arcface_head_shard_rows", "rank=\"1\"", "5"),
        of("arcface_head_sampled_rows", "rank=\"0\"", "2"),
        of("arcface_head_positive_rows", "rank=\"0\"", "1"),
        of("arcface_head_sample_ratio", "rank=\"0\"", "0.4"),
        of_job("arcface_head_target_cosine", "0.5"),
        of("arcface_data_queue_depth", "rank=\"0\"", "3"),
        of("arcface_data_bytes_total", "rank=\"1\"", "2000"),
        of("arcface_data_errors_total", "rank=\"1\"", "0"),
        of_job("arcface_data_decode_seconds_count", "40"),
        of_job("arcface_data_decode_seconds_sum", "0.5"),
        of("arcface_comm_collective_seconds_count", "op=\"all_reduce\"", "4"),
        of("arcface_comm_bytes_total", "op=\"all_reduce\"", "128"),
        of("arcface_checkpoint_failures_total", "stage=\"write\"", "2"),
    ] {
        shows(&line).await;
    }
    let info = |value| {
        let label = "node=\"node-a\",rank=\"0\",gpu=\"3\",uuid=\"GPU-7a5f-09\"";
        of("arcface_worker_gpu_info", label, value)
    };
    for line in [
        info("1"),
        of("arcface_gpu_memory_allocated_bytes", "rank=\"0\"", "64"),
        of("arcface_gpu_memory_reserved_bytes", "rank=\"1\"", "128"),
        of("arcface_gpu_memory_peak_bytes", "rank=\"0\"", "96"),
    ] {
        shows(&line).await;
    }
    let mut odd = figures(20, 1.0);
    odd.gpu = odd.gpu.map(|gpu| v1::RankGpu {
        uuid: "GPU-no such\",x=\"".into(),
        allocated: 65,
        ..gpu
    });
    tell(&zero, odd).await;
    // Reports in between were lost.
    tell(&zero, figures(70, 1.0)).await;
    shows(&of("arcface_data_samples_total", "rank=\"0\"", "70")).await;
    shows(&of_job("arcface_data_decode_seconds_count", "90")).await;
    let page = exporter::render(exporter::recorder().expect("the recorder"));
    assert!(!page.contains("no such"), "labels are of closed sets: {page}");

    zero.metrics(10).await;
    b.exit(&one.assignment, None, Some(9)).await;
    shows(&of("arcface_head_shard_rows", "rank=\"1\"", "0")).await;
    shows(&info("0")).await;
    shows(&of("arcface_gpu_memory_allocated_bytes", "rank=\"0\"", "0")).await;
    let (zero, one) = generation(&cluster, &mut a, &mut b).await;
    cluster.job_in(&id, JobState::Running).await;
    // It counts from 0 again.
    tell(&zero, figures(30, 1.0)).await;
    shows(&of("arcface_data_samples_total", "rank=\"0\"", "100")).await;
    for stage in ["detect", "rendezvous", "load"] {
        let label = format!("stage=\"{stage}\"");
        shows(&of("arcface_recovery_duration_seconds_count", &label, "1")).await;
    }
    // Said again, as on a new stream, it is not counted again: nor was it a first time.
    for rank in [&zero, &one] {
        rank.report(Report::Started(v1::TrainingStarted {
            total_steps: 100,
            restore_seconds: Some(1.5),
            ..Default::default()
        }))
        .await;
    }
    zero.metrics(1).await;
    shows(&of(
        "arcface_recovery_duration_seconds_count",
        "stage=\"total\"",
        "1",
    ))
    .await;
    let page = exporter::render(exporter::recorder().expect("the recorder"));
    let restored = of_job("arcface_checkpoint_restore_seconds_count", "");
    assert!(!page.contains(&restored), "{page}");
    for kind in ["productive", "redone", "restart", "checkpoint", "queued"] {
        let label = format!("kind=\"{kind}\"");
        let line = of("arcface_job_time_seconds_total", &label, "");
        assert!(page.contains(&line), "{line} is not in {page}");
    }
}

#[tokio::test]
async fn what_a_rank_resumes_from_and_writes_is_timed_once() {
    let cluster = Cluster::start().await;
    let (id, mut a, mut b, zero, one) = training(&cluster, spec(2)).await;
    let of_job = |name: &str, value: &str| format!("{name}{{job_id=\"{id}\"}} {value}");
    assert!(
        !zero.commit_after(5, 0.5).await,
        "the parts of rank 1 are missing"
    );
    // Told again, as after a broken stream.
    assert!(!zero.commit_after(5, 0.5).await);
    assert!(one.commit_after(5, 2.0).await, "committed");
    shows(&of_job("arcface_checkpoint_persist_seconds_count", "1")).await;
    shows(&of_job("arcface_checkpoint_persist_seconds_sum", "2")).await;

    b.exit(&one.assignment, None, Some(9)).await;
    let zero = Rank::connect(&cluster, a.launched().await).await;
    let one = Rank::connect(&cluster, b.launched().await).await;
    let (met, others) = tokio::join!(zero.rendezvous(), one.rendezvous());
    assert!(met.is_ok() && others.is_ok());
    for rank in [&zero, &one, &zero] {
        rank.report(Report::Started(v1::TrainingStarted {
            step: 5,
            total_steps: 100,
            restore_seconds: Some(1.5),
            ..Default::default()
        }))
        .await;
    }
    cluster.job_in(&id, JobState::Running).await;
    zero.metrics(6).await;
    shows(&of_job("arcface_checkpoint_restore_seconds_sum", "3")).await;
}
