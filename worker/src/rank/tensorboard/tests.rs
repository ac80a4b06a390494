//! Event files, read again record by record as TensorBoard reads them.

use super::*;

/// The whole records of a file, their checksums compared; what is cut is left out.
fn events(bytes: &[u8]) -> Vec<Event> {
    let mut events = Vec::new();
    let mut rest = bytes;
    while let Some((length, after)) = rest.split_first_chunk::<8>() {
        let Some((crc, after)) = after.split_first_chunk::<4>() else {
            break;
        };
        assert_eq!(u32::from_le_bytes(*crc), masked(crc32c(length)), "of a length");
        let length = u64::from_le_bytes(*length) as usize;
        let Some((message, after)) = after.split_at_checked(length) else {
            break;
        };
        let Some((crc, after)) = after.split_first_chunk::<4>() else {
            break;
        };
        assert_eq!(u32::from_le_bytes(*crc), masked(crc32c(message)), "of a message");
        events.push(Event::decode(message).expect("an event"));
        rest = after;
    }
    events
}

/// All files of an output directory, in the order in which they are read.
fn files(output: &Path) -> Vec<Vec<u8>> {
    let entries = fs::read_dir(output.join(DIRECTORY)).expect("the directory");
    let mut paths: Vec<_> = entries.map(|entry| entry.expect("a file").path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).expect("read")).collect()
}

/// Scalars by tag and step as TensorBoard shows them: a session's start forgets its step and later ones.
fn shown(output: &Path) -> BTreeMap<(String, i64), f32> {
    let mut shown = BTreeMap::new();
    for event in files(output).iter().flat_map(|file| events(file)) {
        match event.what {
            Some(What::SessionLog(SessionLog { status: START })) => {
                shown.retain(|(_, step), _| *step < event.step);
            }
            Some(What::Summary(summary)) => {
                for Scalar { tag, simple_value } in summary.value {
                    shown.insert((tag, event.step), simple_value.expect("a scalar"));
                }
            }
            _ => {}
        }
    }
    shown
}

fn metrics(step: u64, loss: f64) -> StepMetrics {
    StepMetrics {
        step,
        loss,
        target_cosine: Some(0.0),
        phase_seconds: [("head".to_owned(), 1.5)].into(),
        ..Default::default()
    }
}

#[test]
fn checksums_are_those_of_the_standard() {
    // RFC 3720 appendix B.4, and the check value of the catalogue of CRCs.
    assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    assert_eq!(masked(0), 0xa282_ead8);
}

#[test]
fn scalars_come_back_with_their_steps() {
    let scratch = tempfile::tempdir().unwrap();
    let before = since_epoch().as_secs_f64();
    let mut log = Events::create(scratch.path(), 0).unwrap();
    log.metrics(&metrics(10, 4.5));
    log.evaluation(&Evaluation {
        dataset: "lfw".into(),
        step: 10,
        accuracy: 0.75,
        tar_at_far: [("1e-4".to_owned(), 0.5)].into(),
        ..Default::default()
    });
    let found = events(&files(scratch.path())[0]);
    assert_eq!(found[0].what, Some(What::FileVersion("brain.Event:2".into())));
    assert!(found.iter().all(|event| event.wall_time >= before));
    let shown = shown(scratch.path());
    let of = |tag: &str| shown.get(&(tag.to_owned(), 10)).copied();
    assert_eq!(of("train/loss"), Some(4.5));
    assert_eq!(of("train/target_cosine"), Some(0.0), "0 is a value");
    assert_eq!(of("train/loss_scale"), None, "not in fp32");
    assert_eq!(of("phase_seconds/head"), Some(1.5));
    assert_eq!(of("eval/lfw/accuracy"), Some(0.75));
    assert_eq!(of("eval/lfw/tar_at_far_1e-4"), Some(0.5));
}

#[test]
fn a_training_that_resumes_replaces_the_steps_that_it_trains_again() {
    let scratch = tempfile::tempdir().unwrap();
    for (start, steps, loss) in [(0, 1..=6, 1.0), (4, 5..=7, 2.0)] {
        let mut log = Events::create(scratch.path(), start).unwrap();
        for step in steps {
            log.metrics(&metrics(step, loss));
        }
    }
    assert_eq!(files(scratch.path()).len(), 2);
    let shown = shown(scratch.path());
    let losses: Vec<f32> = (1..=7)
        .map(|step| shown[&("train/loss".to_owned(), step)])
        .collect();
    assert_eq!(losses, [1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0]);
    // A new training in the same directory begins anew.
    Events::create(scratch.path(), 0).unwrap();
    assert_eq!(self::shown(scratch.path()), BTreeMap::new());
}

#[test]
fn a_file_that_is_cut_loses_its_last_record_alone() {
    let scratch = tempfile::tempdir().unwrap();
    let mut log = Events::create(scratch.path(), 0).unwrap();
    log.metrics(&metrics(1, 1.0));
    log.metrics(&metrics(2, 1.0));
    let file = files(scratch.path()).remove(0);
    let whole = events(&file).len();
    for cut in [1, 4, 30] {
        assert_eq!(
            events(&file[..file.len() - cut]).len(),
            whole - 1,
            "{cut} bytes cut"
        );
    }
}
