//! Who keeps whose copies, what a copier leaves in the memory of two nodes, and what can be got back from there.

use super::*;
use crate::checkpoint::{PartKind, TrainState, manifest};
use arcface_proto::types::ClassRange;
use arcface_proto::v1::{CheckpointManifest, CheckpointPart, PartCopies};
use proptest::prelude::*;
use std::time::Duration;
use tch::{Kind, Tensor};

fn names(nodes: &[&str]) -> Vec<String> {
    nodes.iter().map(|node| (*node).to_owned()).collect()
}

#[test]
fn the_buddy_has_the_same_place_on_the_next_node() {
    let nodes = names(&["a", "a", "b", "b", "c", "c"]);
    let buddies: Vec<_> = (0..6).map(|rank| buddy(rank, &nodes)).collect();
    assert_eq!(buddies, [2, 3, 4, 5, 0, 1].map(Some));
    let uneven = names(&["a", "a", "a", "b"]);
    let buddies: Vec<_> = (0..4).map(|rank| buddy(rank, &uneven)).collect();
    assert_eq!(buddies, [3, 3, 3, 0].map(Some));
    assert_eq!(buddy(0, &names(&["a", "a"])), None);
    assert_eq!(buddy(0, &[]), None);
}

proptest! {
    #[test]
    fn no_buddy_is_on_the_own_node_and_no_rank_has_more_than_its_share(
        counts in proptest::collection::vec(1usize..9, 2..6),
    ) {
        let nodes: Vec<String> = counts
            .iter()
            .enumerate()
            .flat_map(|(node, count)| std::iter::repeat_n(format!("n{node}"), *count))
            .collect();
        let mut load = vec![0; nodes.len()];
        for rank in 0..nodes.len() {
            let buddy = buddy(rank, &nodes).expect("two nodes");
            prop_assert_ne!(&nodes[rank], &nodes[buddy]);
            load[buddy] += 1;
        }
        for (rank, load) in load.iter().enumerate() {
            let count = |node: &str| nodes.iter().filter(|other| *other == node).count();
            let before = counts.len() - 1;
            let node: usize = nodes[rank][1..].parse().expect("a number");
            let sender = format!("n{}", (node + before) % counts.len());
            prop_assert!(*load <= count(&sender).div_ceil(count(&nodes[rank])));
        }
    }
}

/// Two ranks of ten classes on two nodes, each with its memory.
struct World {
    scratch: tempfile::TempDir,
    copiers: Vec<Option<Copier>>,
    endpoints: [String; 2],
    said: Receiver<(usize, PartsCopied)>,
}

const NODES: [&str; 2] = ["a", "b"];

fn session() -> Session {
    Session {
        job: "job-000000000001".into(),
        generation: 1,
    }
}

fn world() -> World {
    let scratch = tempfile::tempdir().expect("scratch");
    let homes = NODES.map(|node| scratch.path().join(node));
    let servers = homes
        .clone()
        .map(|home| PartsServer::start("127.0.0.1", &session(), home).expect("start"));
    let endpoints = [&servers[0], &servers[1]].map(|server| format!("127.0.0.1:{}", server.port()));
    let (say, said) = sync_channel(16);
    let copiers = servers.into_iter().enumerate().map(|(rank, server)| {
        let destination = Destination {
            home: homes[rank].clone(),
            node: NODES[rank].into(),
            buddy: (NODES[1 - rank].into(), endpoints[1 - rank].clone()),
            session: session(),
            server,
        };
        let say = say.clone();
        let tell = move |copied| drop(say.send((rank, copied)));
        Some(Copier::start(4, 1, destination, None, tell))
    });
    World {
        copiers: copiers.collect(),
        endpoints,
        scratch,
        said,
    }
}

fn shard(rank: usize) -> ClassRange {
    ClassRange::of_rank(10, rank as u32, 2)
}

fn snapshot(rank: usize, step: u64) -> Snapshot {
    let rows = i64::from(shard(rank).len());
    let weight = Tensor::full([rows, 3], step as f64, (Kind::Float, tch::Device::Cpu));
    let mut parts = vec![(PartKind::Head(shard(rank)), vec![("weight".to_owned(), weight)])];
    if rank == 0 {
        let backbone = Tensor::full([4], -(step as f64), (Kind::Float, tch::Device::Cpu));
        parts.push((PartKind::Backbone, vec![("model.w".to_owned(), backbone)]));
    }
    Snapshot {
        state: TrainState {
            step,
            epoch: 0,
            epoch_samples: step * 8,
            scaler: None,
            num_image: None,
        },
        num_classes: 10,
        parts,
    }
}

impl World {
    /// One copy on both ranks; gives what they said, which is one answer a rank that succeeds.
    fn copy(&mut self, step: u64, last_is_whole: bool, answers: usize) -> Vec<PartsCopied> {
        for (rank, copier) in self.copiers.iter_mut().enumerate() {
            let Some(copier) = copier else { continue };
            while copier.is_busy() {
                std::thread::yield_now();
            }
            drop(copier.room());
            copier.copy(snapshot(rank, step), last_is_whole);
        }
        let mut said: Vec<(usize, PartsCopied)> = (0..answers)
            .map(|_| {
                self.said
                    .recv_timeout(Duration::from_secs(30))
                    .expect("an answer")
            })
            .collect();
        said.sort_by_key(|(rank, _)| *rank);
        said.into_iter().map(|(_, copied)| copied).collect()
    }

    fn folders(&self, node: &str) -> Vec<String> {
        let folders = std::fs::read_dir(self.scratch.path().join(node)).expect("a folder");
        let mut names: Vec<String> = folders
            .map(|folder| {
                folder
                    .expect("a folder")
                    .file_name()
                    .to_string_lossy()
                    .into_owned()
            })
            .collect();
        names.sort();
        names
    }
}

fn set(said: &[PartsCopied]) -> (CheckpointManifest, Vec<PartCopies>) {
    let all: Vec<(CheckpointPart, Vec<String>)> = said
        .iter()
        .flat_map(|copied| {
            let parts = copied.parts.clone().expect("parts").parts;
            parts.into_iter().map(|part| (part, copied.nodes.clone()))
        })
        .collect();
    let request = said[0].parts.clone().expect("parts");
    let manifest = CheckpointManifest {
        format: manifest::FORMAT,
        job_id: session().job,
        generation: 1,
        step: request.step,
        world_size: 2,
        num_classes: 10,
        directory: request.directory,
        parts: all.iter().map(|(part, _)| part.clone()).collect(),
        ..CheckpointManifest::default()
    };
    let copies = all.into_iter().map(|(part, nodes)| PartCopies {
        file: part.file,
        nodes,
    });
    (manifest, copies.collect())
}

#[test]
fn both_nodes_have_everything_and_either_alone_is_enough() {
    let mut world = world();
    world.copy(2, true, 2);
    let said = world.copy(4, true, 2);
    assert_eq!(said[0].nodes, ["a", "b"]);
    assert_eq!(said[1].nodes, ["b", "a"]);
    let (manifest, copies) = set(&said);
    for node in NODES {
        let home = world.scratch.path().join(node);
        let all = ClassRange { lo: 0, hi: 10 };
        // No other rank is there to be asked.
        let found = gather(&home, &session(), &manifest, &copies, all, &[]).expect("all of it");
        let rows = &found.head_rows(all).expect("rows")[0].1;
        assert_eq!(rows.size(), [10, 3]);
        assert_eq!(rows.min().double_value(&[]), 4.0);
        assert_eq!(
            found.backbone().expect("backbone")[0].1.max().double_value(&[]),
            -4.0
        );
    }
}

#[test]
fn a_node_without_copies_gets_them_and_damage_is_replaced() {
    let mut world = world();
    let (manifest, copies) = set(&world.copy(2, true, 2));
    let server = PartsServer::start("127.0.0.1", &session(), world.scratch.path().join("b")).expect("start");
    let ranks = [("b".to_owned(), format!("127.0.0.1:{}", server.port()))];
    let home = world.scratch.path().join("new");
    let classes = shard(0);
    gather(&home, &session(), &manifest, &copies, classes, &ranks).expect("from b");
    let folder = home.join(&manifest.directory);
    let mut files: Vec<String> = std::fs::read_dir(&folder)
        .expect("folder")
        .map(|file| file.expect("file").file_name().to_string_lossy().into_owned())
        .collect();
    files.sort();
    assert_eq!(
        files,
        ["backbone.safetensors", "head-0-5.safetensors"],
        "what it reads, no more"
    );
    // Any byte, and any length.
    let path = folder.join("head-0-5.safetensors");
    let good = std::fs::read(&path).expect("read");
    for damage in [0, 9, good.len() / 2, good.len() - 1] {
        let mut bad = good.clone();
        bad[damage] ^= 4;
        std::fs::write(&path, &bad).expect("write");
        gather(&home, &session(), &manifest, &copies, classes, &ranks).expect("from b again");
        assert!(std::fs::read(&path).expect("read") == good);
        std::fs::write(&path, &good[..damage]).expect("write");
        let failure = gather(&home, &session(), &manifest, &copies, classes, &[]).expect_err("nobody has it");
        let damaged = failure.damaged.expect("named");
        assert!(damaged.in_memory && damaged.file == "head-0-5.safetensors" && damaged.step == 2);
    }
    drop(server);
    let failure = gather(&home, &session(), &manifest, &copies, classes, &ranks).expect_err("b is gone");
    assert!(failure.message.contains("b at 127.0.0.1:"), "{}", failure.message);
}

#[test]
fn the_last_whole_set_stays_until_the_next_one_is_whole() {
    let mut world = world();
    world.copy(2, true, 2);
    world.copy(4, true, 2);
    // Whole as the ranks know by now, so the one before may go.
    world.copy(6, true, 2);
    let (two, four, six) = (name(2, 1), name(4, 1), name(6, 1));
    assert_eq!(world.folders("a"), [four.clone(), six.clone()]);
    assert!(!world.folders("b").contains(&two));
    // Rank 1 is gone, and with it the memory of its node: rank 0 keeps what is whole, whatever it tries.
    drop(world.copiers[1].take());
    while std::net::TcpStream::connect(&world.endpoints[1]).is_ok() {
        std::thread::yield_now();
    }
    world.copy(8, true, 0);
    world.copy(10, false, 0);
    world.copy(12, false, 0);
    let copier = world.copiers[0].as_mut().expect("rank 0");
    while copier.is_busy() {
        std::thread::yield_now();
    }
    assert!(copier.has_failed());
    assert_eq!(world.folders("a"), [six, name(12, 1)]);
}

#[test]
fn what_is_lost_stays_under_what_was_asked_for() {
    // The newest set is on its way while the next is not due: at worst one interval and what is under way are lost.
    for steps in 2..100 {
        assert!(2 * interval(steps) <= steps, "{steps}");
    }
}
