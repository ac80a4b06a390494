//! The committed seeds of the fuzz target that reads job files (`fuzz/seeds/job_spec_toml`), replayed: what is called
//! `good` is a job, what is called `bad` is refused, and changed copies give a job or an error.

use std::{fs, path::Path};

use arcface_coordinator::spec;

/// Changed copies of each seed that are read.
const CHANGES: u64 = 1000;

#[test]
fn seeds_and_changed_copies_are_jobs_or_errors() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds/job_spec_toml");
    let mut seen = 0;
    for entry in fs::read_dir(&folder).expect("the seeds") {
        let path = entry.expect("a seed").path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let text = fs::read_to_string(&path).expect("text");
        let read = spec::parse(&text, &[]);
        assert_eq!(read.is_ok(), name.starts_with("good"), "{name}: {:?}", read.err());
        let mut draw = 0x9e37_79b9_7f4a_7c15u64;
        for _ in 0..CHANGES {
            let mut bytes = text.clone().into_bytes();
            for _ in 0..3 {
                // Marsaglia's xorshift: any bytes will do.
                draw ^= draw << 13;
                draw ^= draw >> 7;
                draw ^= draw << 17;
                let place = (draw >> 8) as usize % bytes.len();
                bytes[place] = draw as u8 & 0x7f;
            }
            drop(spec::parse(&String::from_utf8_lossy(&bytes), &[]));
        }
        seen += 1;
    }
    assert!(seen >= 3, "{seen} seeds");
}
