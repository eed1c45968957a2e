#!/bin/sh
# Called by udhcpc with the lease in its environment.
case "$1" in
    deconfig) ip -4 addr flush dev "$interface" ;;
    bound | renew)
        ip addr add "$ip/${mask:-24}" dev "$interface" 2>/dev/null
        for gateway in $router; do
            ip route replace default via "$gateway"
        done
        : > /etc/resolv.conf
        for server in $dns; do
            echo "nameserver $server" >> /etc/resolv.conf
        done
        ;;
esac
exit 0
