//! Which of this machine's addresses faces the coordinator, and which network interface has an address. Asks the kernel;
//! sends nothing.

use nix::ifaddrs::getifaddrs;
use std::net::{IpAddr, UdpSocket};

/// NCCL's variables.
const NCCL_INTERFACE: &str = "NCCL_SOCKET_IFNAME";
const NCCL_FAMILY: &str = "NCCL_SOCKET_FAMILY";

/// What NCCL may use where no interface has the advertised address (behind address translation, or it is a name): anything but
/// the loopback and the bridges of this machine's containers and virtual machines, which lead to no other node.
const NO_BRIDGES: &str = "^lo,docker,virbr";

/// A network interface's name and one of its addresses.
pub type Interface = (String, IpAddr);

/// The network interfaces of this machine, once for each address; none if the kernel does not tell.
pub fn interfaces() -> Vec<Interface> {
    let all = getifaddrs().into_iter().flatten();
    all.filter_map(|interface| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        let v6 = || address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip()));
        Some((interface.interface_name, v4.or_else(v6)?))
    })
    .collect()
}

/// What NCCL is told of the network, as variables of the environment: the interface that has the address by which the node's
/// peers know it, so that NCCL's connections go the way that is known to lead there.
pub fn nccl_network(address: &str, interfaces: &[Interface]) -> Vec<(&'static str, String)> {
    let bare = address.trim_start_matches('[').trim_end_matches(']');
    let Ok(wanted) = bare.parse::<IpAddr>() else {
        return vec![(NCCL_INTERFACE, NO_BRIDGES.to_owned())];
    };
    // NCCL's own words, so that a socket is not opened in the family that the peers do not know.
    let family = match wanted {
        IpAddr::V4(_) => "AF_INET",
        IpAddr::V6(_) => "AF_INET6",
    };
    let found = interfaces.iter().find(|(_, has)| *has == wanted);
    let chosen = match found.filter(|(name, _)| !is_bridge(name)) {
        // The equals sign: not every interface whose name begins so.
        Some((name, _)) => format!("={name}"),
        None => NO_BRIDGES.to_owned(),
    };
    vec![(NCCL_INTERFACE, chosen), (NCCL_FAMILY, family.to_owned())]
}

/// True for `docker0`, `virbr0` and their kind: another node has the same address on its own.
fn is_bridge(interface: &str) -> bool {
    let names = NO_BRIDGES.trim_start_matches('^').split(',');
    names
        .filter(|name| *name != "lo")
        .any(|name| interface.starts_with(name))
}

/// The local address that packets to the first reachable coordinator leave from; loopback if there is none.
/// Connecting a UDP socket sends nothing: it only asks the kernel for the route.
pub fn facing_address(coordinators: &[String]) -> String {
    let route = |coordinator: &String| {
        let socket = UdpSocket::bind("0.0.0.0:0")
            .ok()
            .filter(|socket| socket.connect(coordinator).is_ok())
            .or_else(|| {
                let socket = UdpSocket::bind("[::]:0").ok()?;
                socket.connect(coordinator).ok().map(|()| socket)
            })?;
        Some(socket.local_addr().ok()?.ip().to_string())
    };
    coordinators
        .iter()
        .find_map(route)
        .unwrap_or_else(|| "127.0.0.1".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loopback_coordinator_is_faced_by_loopback() {
        assert_eq!(facing_address(&["127.0.0.1:1".into()]), "127.0.0.1");
        assert_eq!(facing_address(&[]), "127.0.0.1");
    }

    /// What NCCL is told on a machine with the usual interfaces.
    fn told(address: &str) -> Vec<(&'static str, String)> {
        let interface = |name: &str, address: &str| (name.to_owned(), address.parse().expect("an address"));
        let machine = [
            interface("lo", "127.0.0.1"),
            interface("lo", "::1"),
            interface("docker0", "172.17.0.1"),
            interface("virbr0", "192.168.122.1"),
            interface("eth1", "10.0.0.7"),
            interface("eth10", "10.1.0.7"),
            interface("ib0", "fd00::7"),
        ];
        nccl_network(address, &machine)
    }

    #[test]
    fn nccl_uses_the_interface_of_the_advertised_address() {
        for (address, interface, family) in [
            ("10.0.0.7", "=eth1", "AF_INET"),
            ("10.1.0.7", "=eth10", "AF_INET"),
            ("fd00::7", "=ib0", "AF_INET6"),
            ("[fd00::7]", "=ib0", "AF_INET6"),
            ("127.0.0.1", "=lo", "AF_INET"),
            // Behind address translation.
            ("203.0.113.9", NO_BRIDGES, "AF_INET"),
            ("0.0.0.0", NO_BRIDGES, "AF_INET"),
            // Never these, whatever is advertised.
            ("172.17.0.1", NO_BRIDGES, "AF_INET"),
            ("192.168.122.1", NO_BRIDGES, "AF_INET"),
        ] {
            let expected = vec![
                ("NCCL_SOCKET_IFNAME", interface.to_owned()),
                ("NCCL_SOCKET_FAMILY", family.to_owned()),
            ];
            assert_eq!(told(address), expected, "{address}");
        }
        let by_name = vec![("NCCL_SOCKET_IFNAME", NO_BRIDGES.to_owned())];
        assert_eq!(told("node-7.example"), by_name);
    }

    #[test]
    fn this_machine_has_a_loopback() {
        let loopback = |(name, address): &Interface| name == "lo" && address.is_loopback();
        assert!(interfaces().iter().any(loopback), "{:?}", interfaces());
    }
}
