//! A network of its own for a cluster: the coordinator's end is a bridge of this machine, each worker lives in a network
//! namespace behind a cable of its own. Cables can be pulled, and two workers can be kept from hearing each other, such that
//! nothing is refused: packets go nowhere, as on a switch that lost its mind. Needs Linux, `ip` (iproute2) and root.

use anyhow::{Context, Result, bail, ensure};
use std::{
    env,
    net::Ipv4Addr,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

/// A hardware address that nobody has.
const NOBODY: &str = "02:00:00:00:00:01";

/// The network of one cluster. Dropped, it is gone.
pub struct Network {
    /// Begins the names of what belongs to it. Names of interfaces have at most 15 characters.
    name: String,
    subnet: u8,
    namespaces: Vec<String>,
}

impl Network {
    /// Lays out the bridge. `None` where the machine does not allow that, which is said on standard error; in CI that is an
    /// error.
    ///
    /// # Errors
    /// If it cannot be made, in CI.
    pub fn start() -> Result<Option<Self>> {
        // No two of one process share a name or a subnet: of the one before, connections may still be at their farewells.
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let (process, number) = (std::process::id(), STARTED.fetch_add(1, Ordering::Relaxed));
        let mut network = Self {
            name: format!("af{:x}-{number:x}", process % 0x10_0000),
            subnet: (process.wrapping_add(number) % 200) as u8 + 20,
            namespaces: Vec::new(),
        };
        match network.lay_out() {
            Ok(()) => Ok(Some(network)),
            Err(error) if env::var_os("CI").is_some() => Err(error),
            Err(error) => {
                eprintln!("SKIPPED: no network namespaces here (they need root and iproute2): {error:#}");
                Ok(None)
            }
        }
    }

    fn lay_out(&mut self) -> Result<()> {
        let (bridge, address) = (self.bridge(), format!("{}/24", self.host()));
        ip(&["link", "add", &bridge, "type", "bridge"])?;
        ip(&["addr", "add", &address, "dev", &bridge])?;
        ip(&["link", "set", &bridge, "up"])
    }

    fn bridge(&self) -> String {
        format!("{}br", self.name)
    }

    /// The machine's own address in it.
    pub fn host(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 213, self.subnet, 1)
    }

    fn address(&self, index: usize) -> Ipv4Addr {
        Ipv4Addr::new(10, 213, self.subnet, index as u8 + 10)
    }

    fn cable(&self, index: usize) -> String {
        format!("{}c{index}", self.name)
    }

    /// Adds a namespace with a cable to the bridge; gives its number.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn add(&mut self) -> Result<usize> {
        let index = self.namespaces.len();
        let namespace = format!("{}n{index}", self.name);
        let (cable, bridge) = (self.cable(index), self.bridge());
        ip(&["netns", "add", &namespace])?;
        self.namespaces.push(namespace.clone());
        ip(&[
            "link", "add", &cable, "type", "veth", "peer", "name", "eth0", "netns", &namespace,
        ])?;
        ip(&["link", "set", &cable, "master", &bridge, "up"])?;
        let address = format!("{}/24", self.address(index));
        ip(&["-n", &namespace, "addr", "add", &address, "dev", "eth0"])?;
        ip(&["-n", &namespace, "link", "set", "lo", "up"])?;
        ip(&["-n", &namespace, "link", "set", "eth0", "up"])?;
        Ok(index)
    }

    /// The command that runs another one inside a namespace; program and arguments follow.
    pub fn inside(&self, index: usize) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespaces[index]]);
        command
    }

    /// Pulls the cable of a namespace out of the bridge: nothing comes in or goes out, and nobody is told.
    ///
    /// # Errors
    /// If there is no such cable.
    pub fn pull(&self, index: usize) -> Result<()> {
        ip(&["link", "set", &self.cable(index), "nomaster"])
    }

    /// Puts it back.
    ///
    /// # Errors
    /// If there is no such cable.
    pub fn plug(&self, index: usize) -> Result<()> {
        ip(&["link", "set", &self.cable(index), "master", &self.bridge()])
    }

    /// Two namespaces hear nothing of each other, and all else.
    ///
    /// # Errors
    /// If there are no such namespaces.
    pub fn part(&self, a: usize, b: usize) -> Result<()> {
        self.mislead(a, self.address(b))?;
        self.mislead(b, self.address(a))
    }

    /// A namespace does not get through to this machine, the coordinator's; what that sends arrives.
    ///
    /// # Errors
    /// If there is no such namespace.
    pub fn silence(&self, index: usize) -> Result<()> {
        self.mislead(index, self.host())
    }

    fn mislead(&self, index: usize, about: Ipv4Addr) -> Result<()> {
        let (namespace, about) = (&self.namespaces[index], about.to_string());
        let entry = [
            "neigh",
            "replace",
            &about,
            "lladdr",
            NOBODY,
            "dev",
            "eth0",
            "nud",
            "permanent",
        ];
        ip(&[&["-n", namespace], &entry[..]].concat())
    }

    /// Undoes what [`Network::part`] and [`Network::silence`] did to a namespace.
    ///
    /// # Errors
    /// If there is no such namespace.
    pub fn mend(&self, index: usize) -> Result<()> {
        ip(&[
            "-n",
            &self.namespaces[index],
            "neigh",
            "flush",
            "nud",
            "permanent",
            "dev",
            "eth0",
        ])
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // What is gone already needs no removal. A namespace lives on, and its end of the cable with it, for as long as a
        // process or a connection with unsent bytes is in it; the cable is cut so that nothing of that is left here.
        for (index, namespace) in self.namespaces.iter().enumerate() {
            drop(ip(&["link", "del", &self.cable(index)]));
            drop(ip(&["netns", "del", namespace]));
        }
        drop(ip(&["link", "del", &self.bridge()]));
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(arguments).output().context("run `ip`")?;
    let line = arguments.join(" ");
    if !output.status.success() {
        bail!("ip {line}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    ensure!(
        output.stderr.is_empty(),
        "ip {line}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
