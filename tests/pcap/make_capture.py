#!/usr/bin/env python3
"""Writes a capture with well-formed and malformed packets, and what must become of each.

usage: make_capture.py CAPTURE.pcap EXPECTED.json [SEED]

EXPECTED.json: {"packets": N, "messages": {"udp port": [values in order]}, "handled": {protocol: N},
"dropped": {reason: N}}. The names are those of `taffrail stats --json`.
"""

import json
import logging
import random
import sys

logging.getLogger("scapy").setLevel(logging.ERROR)
from scapy.all import (  # noqa: E402
    ARP, Dot1Q, Ether, GRE, ICMP, ICMPv6EchoRequest, ICMPv6ND_NS, ICMPv6NDOptSrcLLAddr, IP, IPOption_NOP,
    IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop, IPv6ExtHdrRouting, Padding, Raw, TCP,
    UDP, fragment, wrpcap,
)

PORT_MAC = "02:70:63:61:70:00"  # what net_pcap calls its first device
PEER_MAC = "02:00:00:00:00:99"
BOX4, PEER4 = "10.77.0.2", "10.77.0.1"
BOX6, PEER6 = "fd77::2", "fd77::1"
GROUP4, OTHER4 = "239.1.2.3", "239.9.9.9"
GROUP6, OTHER6 = "ff15::77", "ff15::99"
RAW = 5000

rng = random.Random(int(sys.argv[3]) if len(sys.argv) > 3 else 1)
packets, messages, handled, dropped = [], [], {}, {}
count = 0


def eth(dst=PORT_MAC, **more):
    return Ether(src=PEER_MAC, dst=dst, **more)


def payload():
    global count
    count += 1
    return f"message {count} ".encode() + bytes(rng.randrange(32, 127) for _ in range(rng.randrange(0, 1200)))


def udp(data, dport=RAW, **more):
    return UDP(sport=rng.randrange(1024, 65536), dport=dport, **more) / Raw(data)


def wire(packet):
    return bytes(packet)


def store(frame, data):
    packets.append(frame)
    messages.append(data.decode("latin-1"))


def drop(frame, reason):
    packets.append(frame)
    dropped[reason] = dropped.get(reason, 0) + 1


def handle(frame, protocol):
    packets.append(frame)
    handled[protocol] = handled.get(protocol, 0) + 1


def well_formed():
    data = payload()
    v4, v6 = IP(src=PEER4, dst=BOX4), IPv6(src=PEER6, dst=BOX6)
    kind = rng.randrange(12)
    if kind == 0:
        store(wire(eth() / v4 / udp(data)), data)
    elif kind == 1:
        store(wire(eth() / v6 / udp(data)), data)
    elif kind == 2:  # priority tag only (VLAN 0) belongs to the untagged port
        store(wire(eth() / Dot1Q(vlan=0, prio=5) / v4 / udp(data)), data)
    elif kind == 3:
        store(wire(eth(dst="01:00:5e:01:02:03") / IP(src=PEER4, dst=GROUP4) / udp(data)), data)
    elif kind == 4:
        store(wire(eth(dst="33:33:00:00:00:77") / IPv6(src=PEER6, dst=GROUP6) / udp(data)), data)
    elif kind == 5:  # no checksum, allowed with IPv4
        store(wire(eth() / v4 / udp(data, chksum=0)), data)
    elif kind == 6:
        v4.options = [IPOption_NOP()] * 4
        store(wire(eth() / v4 / udp(data)), data)
    elif kind == 7:
        store(wire(eth() / v6 / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / udp(data)), data)
    elif kind == 8:
        store(wire(eth() / v6 / IPv6ExtHdrRouting(segleft=0, addresses=[PEER6]) / udp(data)), data)
    elif kind == 9:  # bytes behind the IP packet, as short frames have them
        store(wire(eth() / v4 / udp(data) / Padding(b"\0" * 9)), data)
    elif kind == 10:  # an IPv4 flag that is not fragmentation
        v4.flags = "DF"
        store(wire(eth() / v4 / udp(data)), data)
    else:
        v4.tos = 0xB8
        store(wire(eth() / v4 / udp(data)), data)


def malformed():
    data = payload()
    v4, v6 = IP(src=PEER4, dst=BOX4), IPv6(src=PEER6, dst=BOX6)
    good = wire(eth() / v4 / udp(data))
    kind = rng.randrange(20)
    if kind == 0:
        drop(good[:-3], "truncated")
    elif kind == 1:
        drop(good[: rng.randrange(14, 34)], "truncated")
    elif kind == 2:
        drop(wire(eth() / IP(src=PEER4, dst=BOX4, chksum=0x1234) / udp(data)), "bad_ipv4_checksum")
    elif kind == 3:
        frame = bytearray(good)
        frame[-1] ^= 0x40
        drop(bytes(frame), "bad_udp_checksum")
    elif kind == 4:
        frame = bytearray(wire(eth() / v6 / udp(data)))
        frame[-1] ^= 0x40
        drop(bytes(frame), "bad_udp_checksum")
    elif kind == 5:  # RFC 8200: no checksum is an error with IPv6
        drop(wire(eth() / v6 / udp(data, chksum=0)), "bad_udp_checksum")
    elif kind == 6:
        for piece in fragment(v4 / udp(data + b"x" * 2000), fragsize=1000):
            drop(wire(eth() / piece), "fragment")
    elif kind == 7:
        drop(wire(eth() / v6 / IPv6ExtHdrFragment(offset=0, m=1, id=7) / udp(data)), "fragment")
    elif kind == 8:
        drop(wire(eth() / v4 / udp(data, dport=9999)), "unknown_port")
    elif kind == 9:
        drop(wire(eth() / IP(src=PEER4, dst="10.77.0.77") / udp(data)), "not_for_us")
    elif kind == 10:
        drop(wire(eth(dst="01:00:5e:09:09:09") / IP(src=PEER4, dst=OTHER4) / udp(data)), "not_for_us")
    elif kind == 11:
        drop(wire(eth(dst="33:33:00:00:00:99") / IPv6(src=PEER6, dst=OTHER6) / udp(data)), "not_for_us")
    elif kind == 12:
        drop(wire(eth(dst="02:00:00:00:00:55") / v4 / udp(data)), "not_for_us")
    elif kind == 13:
        drop(wire(eth(type=0x88B5) / Raw(data)), "unknown_ethertype")
    elif kind == 14:
        drop(wire(eth() / v4 / GRE() / Raw(data)), "unknown_protocol")
    elif kind == 15:
        drop(wire(eth() / v4 / TCP(dport=80) / Raw(data)), "unknown_protocol")
    elif kind == 16:  # longer than the IP packet that holds it
        drop(wire(eth() / v4 / udp(data, len=len(data) + 100)), "bad_length")
    elif kind == 17:  # shorter than its own header
        drop(wire(eth() / v4 / udp(data, len=4)), "bad_length")
    elif kind == 18:
        drop(wire(eth() / Dot1Q(vlan=42) / v4 / udp(data)), "wrong_vlan")
    else:
        frame = bytearray(good)
        frame[14] = 0x55  # IP version 5 under IPv4's EtherType
        drop(bytes(frame), "bad_ip_header")


def control():
    kind = rng.randrange(5)
    if kind == 0:
        handle(wire(eth(dst="ff:ff:ff:ff:ff:ff") / ARP(op=1, hwsrc=PEER_MAC, psrc=PEER4, pdst=BOX4)), "arp")
    elif kind == 1:
        handle(wire(eth() / IP(src=PEER4, dst=BOX4) / ICMP() / Raw(b"ping")), "icmp")
    elif kind == 2:
        handle(wire(eth() / IPv6(src=PEER6, dst=BOX6) / ICMPv6EchoRequest(data=b"ping")), "icmpv6")
    elif kind == 3:
        solicit = IPv6(src=PEER6, dst="ff02::1:ff00:2", hlim=255) / ICMPv6ND_NS(tgt=BOX6)
        handle(wire(eth(dst="33:33:ff:00:00:02") / solicit / ICMPv6NDOptSrcLLAddr(lladdr=PEER_MAC)), "icmpv6")
    else:  # for somebody else, but a broadcast reaches everyone
        handle(wire(eth(dst="ff:ff:ff:ff:ff:ff") / ARP(op=1, hwsrc=PEER_MAC, psrc=PEER4, pdst="10.77.0.50")), "arp")


for _ in range(1200):
    rng.choices([well_formed, malformed, control], [10, 8, 2])[0]()
for length in range(0, 14):  # shorter than an Ethernet header
    drop(bytes(length), "truncated") if length else None

wrpcap(sys.argv[1], [Raw(frame) for frame in packets], linktype=1)
with open(sys.argv[2], "w", encoding="ascii") as out:
    json.dump({"packets": len(packets), "messages": {str(RAW): messages}, "handled": handled, "dropped": dropped}, out)
