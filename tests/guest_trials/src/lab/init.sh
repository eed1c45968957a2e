#!/bin/busybox sh
# The init of the laboratory: loads the modules, mounts the host's folders, runs the session's command on KVM, and ends
# QEMU with its exit status. Its own words go to the log, which is the first serial line.
#
#   /lab/shares    a line for each folder of the host: TAG OPTIONS PATH
#   /lab/session   the script that is run

/bin/busybox mkdir -p /proc /sys /dev /tmp /run /sbin /usr/bin /usr/sbin
/bin/busybox --install -s
export PATH=/lab:/bin:/sbin:/usr/bin:/usr/sbin HOME=/root TERM=vt100 XDG_RUNTIME_DIR=/run
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /dev/pts
mount -t devpts pts /dev/pts
# A checkout below /tmp brings files to there.
[ -n "$(ls -A /tmp)" ] || mount -t tmpfs tmp /tmp

# end STATUS: comes out of QEMU as 2 * (STATUS + 1) + 1 (isa-debug-exit).
end() {
    echo "LAB-END $1"
    sync
    printf "\\$(printf %03o $(($1 > 126 ? 127 : $1 + 1)))" | dd of=/dev/port bs=1 seek=$((0xf4)) count=1 conv=notrunc 2>/dev/null
    poweroff -f
}

for module in $(cat /lib/bedplate/modules); do
    insmod "/lib/bedplate/$module.ko" || echo "LAB-NOTE $module did not load"
done
while read -r tag options path; do
    mkdir -p "$path"
    mount -t 9p -o "trans=virtio,version=9p2000.L,msize=524288,$options" "$tag" "$path" || end 125
done < /lab/shares
ifconfig lo 127.0.0.1 up
if ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up 2>/dev/null; then
    route add default gw 10.0.2.2
    echo nameserver 10.0.2.3 > /etc/resolv.conf
fi
# port NAME: the device of a port.
port() {
    for folder in /sys/class/virtio-ports/*; do
        [ "$(cat "$folder/name")" = "$1" ] && echo "/dev/${folder##*/}" && return
    done
}
# Commands from outside, a line each; see control.rs.
control() {
    device=$(port bedplate.control)
    exec 5<>"$device"
    while true; do
        # Nobody is connected.
        read -r line <&5 || { usleep 100000; continue; }
        sh -c "$line" <&- >&5 2>&1
        echo "LAB-STATUS $?" >&5
    done
}
control &
[ -c /dev/kvm ] || { echo "LAB-NOTE there is no /dev/kvm"; end 125; }
echo "LAB-READY $(cut -d' ' -f1 /proc/uptime) s, npt $(cat /sys/module/kvm_amd/parameters/npt), $(nproc) cpus"
. /lab/session
end $?
