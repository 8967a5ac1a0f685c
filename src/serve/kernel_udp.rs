//! Ports of kernel sockets: which sockets a port's listeners take, and the thread that serves them.
//!
//! Invariant: of a listener's datagrams each reaches one socket, whatever its address or group. A socket is bound to one of
//! the port's addresses and a UDP port; groups are joined on the interfaces that have the port's addresses, by the socket for
//! all addresses of the family where there is one, else by a socket of the group's own (a socket that is bound to a host's
//! address gets no group's datagrams).

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use super::Error;
use super::lcores::{Clock, Phase};
use super::ports::{PortView, Source};
use crate::config::{Config, Port};
use crate::fallback::udp::{BURST, UdpSocket, interface_of, is_link_local, socket_address};
use crate::memory::wake::Wake;
use crate::net::buffers::{self, LARGE, Pool, Return, SMALL};
use crate::net::kernel::{KernelPort, KernelWorker};
use crate::net::lanes::ShardLink;
use crate::net::routes::RouteCell;
use crate::net::{Demux, Listener, NetCounters};
use crate::shard::{INBOUND_SLOTS, ROUND_MESSAGES};

/// Large datagrams on their way to shards while bursts are still taken whole, and those of a burst: 12 MiB. Beyond that the
/// thread takes fewer at a time, and none once all buffers are with shards.
const LARGE_BUFFERS: usize = 128 + BURST;
/// How long the thread sleeps at rest: what a gap's report, and newer routes, may wait for.
const REST: Duration = Duration::from_millis(100);
/// How long it sleeps while shards hold all its buffers: they wake nobody when they give them back.
const STARVED: Duration = Duration::from_millis(1);
/// Addresses that the log names of a port.
const NAMED: usize = 8;

/// As many as can be on their way to the shards, in a round of theirs, and in two bursts.
fn small_buffers(config: &Config) -> usize {
    usize::from(config.storage.shards) * (INBOUND_SLOTS + ROUND_MESSAGES) + 2 * BURST
}

/// Bytes that the ports of kernel sockets take for datagrams; 0: there are none.
pub(super) fn memory(config: &Config) -> u64 {
    match config.kernel_ports().next() {
        None => 0,
        Some(_) => {
            let rest = BURST * (LARGE - SMALL);
            buffers::bytes(small_buffers(config), LARGE_BUFFERS) + rest as u64
        }
    }
}

/// The opened sockets, while the server is put together.
pub(super) struct Wiring {
    ports: Vec<KernelPort>,
    pool: Pool,
    wake: Arc<Wake>,
    /// By shard.
    returns: Vec<Option<Return>>,
    /// For the statistics, with their places among all ports.
    pub views: Vec<(usize, PortView)>,
}

/// Opens the sockets of every port that has some; `None`: no port has.
pub(super) fn open(config: &Config) -> Result<Option<Wiring>, Error> {
    let (mut ports, mut views) = (Vec::new(), Vec::new());
    for (number, settings) in config.kernel_ports() {
        let listeners = super::listeners(config, number);
        let sockets = sockets(settings, &listeners)?;
        say(settings, &sockets);
        let counters = Arc::new(NetCounters::default());
        views.push((
            number,
            PortView {
                name: settings.name.clone(),
                source: Source::Kernel(sockets.clone()),
                counters: vec![Arc::clone(&counters)],
            },
        ));
        ports.push(KernelPort {
            number: number as u16,
            demux: Demux::new(&listeners)?,
            counters,
            mtu: settings.mtu,
            sockets,
        });
    }
    if ports.is_empty() {
        return Ok(None);
    }
    let count: usize = ports.iter().map(|port| port.sockets.len()).sum();
    if count > usize::from(u16::MAX) {
        return Err(format!(
            "kernel ports would have {count} sockets, one for each address and UDP port: 65535 are possible"
        )
        .into());
    }
    let shards = usize::from(config.storage.shards);
    let (pool, returns) = buffers::pool(small_buffers(config), LARGE_BUFFERS, shards);
    Ok(Some(Wiring {
        ports,
        pool,
        wake: Arc::new(Wake::new()?),
        returns: returns.into_iter().map(Some).collect(),
        views,
    }))
}

/// What the log says of a port.
fn say(settings: &Port, sockets: &[Arc<UdpSocket>]) {
    let name = &settings.name;
    let mut at: Vec<String> = sockets.iter().map(|s| s.address().to_string()).collect();
    if at.is_empty() {
        tracing::warn!(
            "port {name}: no [[udp]] entry leads there and there is no [datagram], so it listens to nothing"
        );
        return;
    }
    let more = at.len().saturating_sub(NAMED);
    at.truncate(NAMED);
    let more = match more {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    tracing::info!("port {name}: kernel sockets at {}{more}", at.join(", "));
    let least = sockets.iter().map(|socket| socket.buffer() as u64).min();
    if let Some(least) = least
        && least < settings.receive_buffer
    {
        let iec = |bytes| bytesize::ByteSize(bytes).display().iec();
        tracing::warn!(
            "port {name}: the kernel gives sockets {} of the {} that receive_buffer asks for: raise net.core.rmem_max, or run \
             with CAP_NET_ADMIN",
            iec(least),
            iec(settings.receive_buffer)
        );
    }
}

/// A socket to be opened: where it is bound, whether others may be, and the groups that it joins, each on an interface.
#[derive(Debug, PartialEq, Eq)]
struct Wanted {
    ip: IpAddr,
    udp_port: u16,
    /// Of a link-local address, else 0.
    interface: u32,
    shared: bool,
    joins: Vec<(IpAddr, u32)>,
}

/// The sockets that a port's listeners take. `interface` gives the index of the interface that has an address, 0 where it is
/// the kernel's choice.
fn wanted(
    settings: &Port,
    listeners: &[Listener],
    mut interface: impl FnMut(IpAddr) -> Result<u32, Error>,
) -> Result<Vec<Wanted>, Error> {
    let mut wanted = Vec::new();
    let udp_ports: BTreeSet<u16> = listeners.iter().map(|l| l.udp_port).collect();
    for udp_port in udp_ports {
        let here = || listeners.iter().filter(|l| l.udp_port == udp_port);
        let any = here().any(|listener| listener.group.is_none());
        for v4 in [true, false] {
            let addresses = settings.addresses.iter().map(|a| a.address);
            let addresses: Vec<IpAddr> = addresses.filter(|a| a.is_ipv4() == v4).collect();
            let groups = settings.multicast.iter().copied();
            let groups = groups.filter(|group| group.is_ipv4() == v4);
            let groups: BTreeSet<IpAddr> = groups
                .filter(|group| any || here().any(|l| l.group == Some(*group)))
                .collect();
            let mut interfaces = BTreeSet::new();
            for &address in &addresses {
                interfaces.insert(match address.is_unspecified() {
                    true => 0,
                    false => interface(address)?,
                });
            }
            if interfaces.is_empty() {
                interfaces.insert(0);
            }
            let joins = |group: IpAddr| interfaces.iter().map(move |&index| (group, index));
            let for_all = any && addresses.iter().any(IpAddr::is_unspecified);
            if any {
                for &ip in &addresses {
                    let joined = groups.iter().filter(|_| for_all).copied();
                    wanted.push(Wanted {
                        ip,
                        udp_port,
                        interface: match ip {
                            IpAddr::V6(v6) if is_link_local(v6) => interface(ip)?,
                            _ => 0,
                        },
                        shared: false,
                        joins: joined.flat_map(joins).collect(),
                    });
                }
            }
            for &group in groups.iter().filter(|_| !for_all) {
                let own = |interface, joins| Wanted {
                    ip: group,
                    udp_port,
                    interface,
                    shared: true,
                    joins,
                };
                match group {
                    // A group of a link: one socket for each.
                    IpAddr::V6(v6) if is_link_local(v6) => {
                        for (group, index) in joins(group) {
                            if index == 0 {
                                return Err(format!(
                                    "port {}: {group} is a group of a single link: name an IPv6 address of that \
                                     interface in `addresses`",
                                    settings.name
                                )
                                .into());
                            }
                            wanted.push(own(index, vec![(group, index)]));
                        }
                    }
                    _ => wanted.push(own(0, joins(group).collect())),
                }
            }
        }
    }
    Ok(wanted)
}

/// Opens the sockets of a port.
fn sockets(settings: &Port, listeners: &[Listener]) -> Result<Vec<Arc<UdpSocket>>, Error> {
    let name = &settings.name;
    let interface = |ip: IpAddr| -> Result<u32, Error> {
        let index = interface_of(ip).map_err(|e| format!("interfaces cannot be listed: {e}"))?;
        index.ok_or_else(|| {
            format!("port {name}: no interface of this machine has the address {ip} (`ip address` shows them)").into()
        })
    };
    let wanted = wanted(settings, listeners, interface)?;
    let open = |wanted: Wanted| -> Result<Arc<UdpSocket>, Error> {
        let address = socket_address(wanted.ip, wanted.udp_port, wanted.interface);
        let socket = UdpSocket::bind(address, wanted.shared, settings.receive_buffer as usize)
            .map_err(|e| format!("port {name}: cannot listen at UDP {address}: {e}"))?;
        for (group, interface) in wanted.joins {
            socket.join(group, interface).map_err(|e| {
                let where_to = match interface {
                    0 => "by the kernel's routes; name an address of its interface in `addresses`"
                        .to_owned(),
                    index => format!("on interface {index}"),
                };
                format!("port {name}: cannot join {group} {where_to}: {e}")
            })?;
        }
        Ok(Arc::new(socket))
    };
    wanted.into_iter().map(open).collect()
}

impl Wiring {
    /// Wakes the thread.
    pub(super) fn wake(&self) -> Arc<Wake> {
        Arc::clone(&self.wake)
    }

    /// The way back of buffers from a shard; to be asked for once a shard.
    pub(super) fn buffers_of(&mut self, shard: usize) -> Option<Return> {
        self.returns.get_mut(shard)?.take()
    }

    /// What the thread runs, as receiver number `index`, until the stop.
    pub(super) fn work(
        self,
        index: u8,
        links: Vec<ShardLink>,
        routes: Arc<RouteCell>,
        phase: Arc<Phase>,
    ) -> Result<impl FnOnce() + Send + 'static, Error> {
        let (wake, descriptor) = (Arc::clone(&self.wake), self.wake.descriptor());
        let worker = KernelWorker::new(index, self.ports, links, routes, self.pool, descriptor)?;
        Ok(move || run(worker, &wake, &phase))
    }
}

/// A receiver that may push to shards; they do not close before it is dropped, by a panic too.
struct Receiving<'a>(&'a Phase);

impl Drop for Receiving<'_> {
    fn drop(&mut self) {
        self.0.received();
    }
}

/// Serves the sockets until the stop, then goes through its phases as an rx lcore does.
fn run(mut worker: KernelWorker, wake: &Wake, phase: &Phase) {
    let (clock, receiving) = (Clock::new(), Receiving(phase));
    while !phase.is_stopping() {
        let work = worker.poll(clock.now());
        wait(&mut worker, wake, work);
    }
    worker.finish(clock.now());
    drop(receiving);
    loop {
        let last = phase.are_shards_closed();
        while worker.send_acks() > 0 {}
        if last {
            break;
        }
        std::thread::sleep(STARVED);
    }
}

/// Looks which sockets have datagrams; sleeps where the round found no `work` and there is none.
fn wait(worker: &mut KernelWorker, wake: &Wake, work: usize) {
    let time = match (work, worker.is_starved()) {
        (1.., _) => Duration::ZERO,
        (0, true) => STARVED,
        (0, false) => REST,
    };
    // Armed before the last look at the rings.
    wake.arm();
    let time = match worker.has_acks() {
        true => Duration::ZERO,
        false => time,
    };
    if let Err(error) = worker.wait(time) {
        // epoll_wait fails for wrong arguments alone; whatever it is, the thread must neither spin nor end.
        tracing::error!("kernel UDP: sockets cannot be waited for: {error}");
        std::thread::sleep(REST);
    }
    wake.disarm();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::Target;
    use std::path::Path;

    /// What a port takes whose addresses lie on interfaces 1 (10.0.0.1, fd00::1), 2 (10.0.0.2) and 3 (fe80::3).
    fn of(keys: &str, listeners: &[(u16, Option<&str>)]) -> Result<Vec<String>, String> {
        let text = format!(
            "[storage]\npath = \"/d\"\n[[port]]\nname = \"k\"\ndevice = \"kernel\"\n{keys}\n"
        );
        let config = Config::parse(&text, Path::new("t")).unwrap();
        let listeners: Vec<Listener> = listeners
            .iter()
            .map(|&(udp_port, group)| Listener {
                udp_port,
                group: group.map(|g| g.parse().unwrap()),
                target: Target::Datagram,
            })
            .collect();
        let interface = |ip: IpAddr| match ip.to_string().chars().last() {
            Some(last) => Ok(last.to_digit(10).unwrap()),
            None => Ok(0),
        };
        let wanted = wanted(&config.ports[0], &listeners, interface).map_err(|e| e.to_string())?;
        let shown = wanted.iter().map(|w| {
            let address = socket_address(w.ip, w.udp_port, w.interface);
            let joins = w
                .joins
                .iter()
                .map(|(group, index)| format!(" {group}@{index}"));
            let joins: String = joins.collect();
            format!("{address}{joins}{}", if w.shared { " shared" } else { "" })
        });
        Ok(shown.collect())
    }

    #[test]
    fn every_address_and_group_has_one_socket() {
        let keys = "addresses = [\"10.0.0.1\", \"10.0.0.2\", \"fd00::1\"]\nmulticast = [\"239.1.1.1\", \"239.1.1.2\"]";
        assert_eq!(
            of(
                keys,
                &[(9, None), (9, Some("239.1.1.2")), (8, Some("239.1.1.1"))]
            )
            .unwrap(),
            [
                "239.1.1.1:8 239.1.1.1@1 239.1.1.1@2 shared",
                "10.0.0.1:9",
                "10.0.0.2:9",
                "239.1.1.1:9 239.1.1.1@1 239.1.1.1@2 shared",
                "239.1.1.2:9 239.1.1.2@1 239.1.1.2@2 shared",
                "[fd00::1]:9",
            ]
        );
        // A group that the port does not join is another port's.
        assert_eq!(of(keys, &[(9, Some("239.9.9.9"))]).unwrap(), [""; 0]);
    }

    #[test]
    fn a_socket_for_all_addresses_joins_the_groups_itself() {
        let keys = "addresses = [\"0.0.0.0\", \"::\"]\nmulticast = [\"239.1.1.1\", \"ff15::1\"]";
        assert_eq!(
            of(keys, &[(9, None), (7, Some("ff15::1"))]).unwrap(),
            [
                "[ff15::1]:7 ff15::1@0 shared",
                "0.0.0.0:9 239.1.1.1@0",
                "[::]:9 ff15::1@0",
            ]
        );
    }

    #[test]
    fn what_belongs_to_a_link_is_bound_to_its_interface() {
        let keys = "addresses = [\"fe80::3\", \"fd00::1\"]\nmulticast = [\"ff02::9\"]";
        assert_eq!(
            of(keys, &[(9, None)]).unwrap(),
            [
                "[fe80::3%3]:9",
                "[fd00::1]:9",
                "[ff02::9%1]:9 ff02::9@1 shared",
                "[ff02::9%3]:9 ff02::9@3 shared",
            ]
        );
        let none = "addresses = [\"10.0.0.1\"]\nmulticast = [\"ff02::9\"]";
        assert!(of(none, &[(9, None)]).unwrap_err().contains("single link"));
    }
}
