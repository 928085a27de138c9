#!/usr/bin/env bash
# download.sh: fetch Llama 2 or Code Llama weights, verify them, resume what was cut.
#
#   ./download.sh                                  asks for the link from Meta's e-mail and for the models
#   ./download.sh --url 'LINK' --models 7B-chat    asks nothing
#   ./download.sh --from hf --models 7B-chat       from the Hugging Face hub, with its own client and login
#
#   --url LINK       the signed link; "-" reads it from standard input (environment: PRESIGNED_URL)
#   --models LIST    7B,13B,70B,7B-chat,13B-chat,70B-chat, or with a Code Llama link 7b,13b,34b and the
#                    same with -Python and -Instruct, or "all" (environment: MODEL_SIZE)
#   --dir DIR        where the model folders go; the current folder by default (environment: TARGET_FOLDER)
#   --jobs N         transfers at the same time, 1 by default
#   --family NAME    llama2 or codellama, where neither the link nor the models tell
#   --from SOURCE    meta (default) or hf
#   --layout NAME    with --from hf: original (default) or hf
#   --no-space-check start although the disk seems too small
#   --help           these lines
#
# Environment: DOWNLOAD_PAUSE, seconds before the second try, doubled for each further one (2);
# DOWNLOAD_TRIES, tries without a new byte before a file is given up (6); DOWNLOAD_TIMEOUT, seconds
# without an answer that count as a lost connection (60); HF_TOKEN and HF_ENDPOINT for the hub.
# Status: 0 everything asked for is there and verified, 1 not so, 2 wrong usage.

# shellcheck disable=SC2317,SC2329  # traps and work_off call functions by name
#
# A copy with Windows line ends runs itself without them; each of these lines ends in # so that both forms parse.
if [ -z "${DOWNLOAD_LF:-}" ] && [ -n "$(tr -dc '\r' < "$0")" ]; then export DOWNLOAD_LF=1; exec bash -c "$(tr -d '\r' < "$0")" "$0" "$@"; fi #
if [ -z "${BASH_VERSION:-}" ]; then command -v bash > /dev/null && exec bash "$0" "$@"; echo "download.sh needs bash" >&2; exit 1; fi #

set +o posix
set -u
export LC_ALL=C

SITE=https://www.llama.com/llama-downloads
FROM=meta LAYOUT=original FAMILY='' JOBS=1 SPACE_CHECK=1
LINK=${PRESIGNED_URL:-} MODELS=${MODEL_SIZE:-} DIR=${TARGET_FOLDER:-.}
PAUSE=${DOWNLOAD_PAUSE:-2} TRIES=${DOWNLOAD_TRIES:-6} TIMEOUT=${DOWNLOAD_TIMEOUT:-60}
unset PRESIGNED_URL
HERE=$(cd "$(dirname "$0")" && pwd)
START=$PWD
STATE=''                                         # the folder of this run's notes, once it is ours
PRESENT="verified already, skipped"
FOLDERS=() SHARDS=() MEGABYTES=()                # one entry per model
NAMES=() FILES=() SUMS=()                        # one entry per file: name in the link, path on disk, md5 or empty

say() { printf '%s\n' "$*"; }
warn() { printf 'download.sh: %s\n' "$*" >&2; }
die() { warn "$@"; exit 1; }
usage() { warn "$* (--help tells more)"; exit 2; }
lower() { printf '%s' "$1" | tr '[:upper:]' '[:lower:]'; }
size_of() { if [ -e "$1" ]; then echo $(($(wc -c < "$1"))); else echo 0; fi; }

parse_arguments() {
  local flag value
  while [ $# -gt 0 ]; do
    flag=$1; shift
    case $flag in
      --help|-h) tr -d '\r' < "$0" | sed -n '2,/^$/s/^# \{0,1\}//p'; exit 0 ;;
      --no-space-check) SPACE_CHECK=0; continue ;;
      --*=*) value=${flag#*=}; flag=${flag%%=*} ;;
      --*) [ $# -gt 0 ] || usage "$flag needs a value"; value=$1; shift ;;
      *) usage "what is \"$flag\"? A link goes after --url, in quotes" ;;
    esac
    case $flag in
      --url) LINK=$value ;;
      --models) MODELS=$value ;;
      --dir) DIR=$value ;;
      --jobs) JOBS=$value ;;
      --family) FAMILY=$value ;;
      --from) FROM=$value ;;
      --layout) LAYOUT=$value ;;
      *) usage "unknown flag $flag" ;;
    esac
  done
  case $JOBS in ''|*[!0-9]*|0*) usage "--jobs takes a whole number from 1, not \"$JOBS\"" ;; esac
  case $PAUSE$TRIES$TIMEOUT in *[!0-9]*) usage "DOWNLOAD_PAUSE, _TRIES and _TIMEOUT take whole numbers" ;; esac
  case $FAMILY in ''|llama2|codellama) ;; *) usage "--family is llama2 or codellama, not \"$FAMILY\"" ;; esac
  case $FROM:$LAYOUT in
    meta:original|hf:original|hf:hf) ;;
    meta:hf) usage "--layout hf needs --from hf: Meta's link has the original layout only" ;;
    *) usage "--from is meta or hf, --layout is original or hf" ;;
  esac
}

# ---- tools: looked for before anything is asked

find_tools() {
  local tool missing=''
  for tool in awk cat df dirname du grep head mkdir mv rm rmdir sed sh sleep sort tail tr wc; do
    command -v "$tool" > /dev/null || missing="$missing $tool"
  done
  [ -z "$missing" ] || die "missing:$missing; install them and run this again"
  find_digest MD5 d41d8cd98f00b204e9800998ecf8427e "md5sum" "md5 -q" "openssl md5"
  if [ "$FROM" = hf ]; then
    find_digest SHA256 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855 \
      "sha256sum" "shasum -a 256" "openssl sha256"
    CLIENT=$(command -v hf || command -v huggingface-cli) ||
      die "missing: hf, the hub's command-line client: pip install -e '.[hf]', or pip install huggingface_hub"
  elif command -v curl > /dev/null; then CLIENT=curl
  elif wget --version 2> /dev/null | grep -q 'GNU Wget'; then CLIENT=wget
  elif command -v wget > /dev/null; then die "missing: curl, or GNU wget (the wget here is another, which cannot resume)"
  else die "missing: curl or wget; install one of them and run this again"
  fi
}

find_digest() { # VARIABLE, DIGEST of nothing, COMMAND...: the first command here that computes it right
  local variable=$1 empty=$2 candidate; shift 2
  for candidate in "$@"; do
    if $candidate < /dev/null 2> /dev/null | grep -q "$empty"; then
      IFS=' ' read -r -a "${variable?}" <<< "$candidate"
      return
    fi
  done
  die "missing: one of: $(printf '%s; ' "$@" | sed 's/; $//')"
}

matches() { # FILE, SUM: an MD5, or a SHA-256 by its length
  local line=''
  # In the background, because bash acts on a signal only while it waits.
  case ${#2} in
    64) "${SHA256[@]}" < "$1" > "$SCRATCH.digest" & ;;
    *) "${MD5[@]}" < "$1" > "$SCRATCH.digest" & ;;
  esac
  wait $!
  read -r line < "$SCRATCH.digest"
  [[ $line =~ [0-9a-f]{32,} ]] && [ "${BASH_REMATCH[0]}" = "$2" ]
}

# ---- the link

refuse() { die "this link cannot be used: $*"; }

ask() { # PROMPT, what to say where nobody can answer: REPLY
  [ -t 0 ] || usage "$2"
  printf '%s' "$1" >&2
  read -r REPLY || die "no answer"
}

read_link() { # the link from flag, environment, standard input or keyboard, without what mails and shells leave around it
  if [ "$LINK" = - ]; then LINK=$(cat); fi
  [ -n "$LINK" ] || { ask "Paste the link from Meta's e-mail: " "no link: give --url, or PRESIGNED_URL"; LINK=$REPLY; }
  LINK=$(printf '%s' "$LINK" | tr -d "\\r\\n\"'<>" |
    sed -e 's/^[[:space:]]*//' -e 's/[[:space:]]*$//' -e 's/&\(amp;\)\{1,\}/\&/g' -e 's|/%2[Aa]?|/*?|')
}

unwrap_link() { # a redirector's link often carries the real one as a percent-encoded parameter
  local inner
  inner=$(printf '%s' "$LINK" | sed -n 's/.*[?&][^=&]*=\(https\{0,1\}%3[Aa]%2[Ff]%2[Ff][^&]*\).*/\1/p')
  if [ -n "$inner" ]; then LINK=$(printf '%b' "${inner//%/\\x}" | sed 's|/%2[Aa]?|/*?|'); fi
}

check_link() { # refuses what cannot be Meta's signed link; LINK, and FAMILY where the host tells
  local host path odd='*[!][A-Za-z0-9:/?#@!$&()*+,;=._~%-]*'
  case $LINK in
    *://*) ;;
    *@*) refuse "it is an e-mail address; paste the link that Meta sent to it, which begins with https://" ;;
    *) refuse "it does not begin with https://" ;;
  esac
  case $LINK in *[[:space:]]*) refuse "there is a space in it; paste the link alone" ;; esac
  # shellcheck disable=SC2254  # a pattern is meant
  case $LINK in $odd) refuse "it has characters that no link has; paste the link alone" ;; esac
  unwrap_link
  case $LINK in http://*|https://*) ;; *) refuse "it does not begin with https://" ;; esac
  host=${LINK#*://}; host=${host%%[/?#]*}; host=${host##*@}; host=$(lower "${host%%:*}")
  path=${LINK#*://}; path=${path%%[?#]*}
  case $path in
    */\*) ;;
    *)
      case $host in
        *facebook.com|*safelinks*|*urldefense*|*google.com|*mimecast*|*cudasvc.com|*proofpoint.com|t.co)
          refuse "$host wraps it; copy the text of the link, not its address" ;;
      esac
      refuse "there is no * in it where the file's name goes; copy the text of the link, not its address" ;;
  esac
  case $host in
    download.llamameta.net) : "${FAMILY:=llama2}" ;;
    download2.llamameta.net) : "${FAMILY:=codellama}" ;;
    *.llamameta.net) refuse "$host is for another model family; ask for Llama 2 or Code Llama at $SITE" ;;
    *) return ;;
  esac
  case $LINK in
    *Policy=*Signature=*Key-Pair-Id=?*) ;;
    *) refuse "its end is missing; put the whole link in quotes" ;;
  esac
}

guess_family() { # from the names of the models, for a link whose host does not tell
  [ -z "$FAMILY" ] || return
  case $(lower "$MODELS") in
    *codellama*|*python*|*instruct*|*34b*) FAMILY=codellama ;;
    *chat*|*llama*|*70b*) FAMILY=llama2 ;;
    *) case $MODELS in *b*) FAMILY=codellama ;; *) FAMILY=llama2 ;; esac ;;
  esac
}

# ---- the models

all_models() {
  if [ "$FAMILY" = codellama ]
  then echo 7b,13b,34b,7b-Python,13b-Python,34b-Python,7b-Instruct,13b-Instruct,34b-Instruct
  else echo 7B,13B,70B,7B-chat,13B-chat,70B-chat
  fi
}

read_models() {
  guess_family
  if [ -z "${MODELS// /}" ]; then
    ask "Which models ($(all_models)), or Enter for all: " "no models: give --models LIST, or --models all"
    MODELS=${REPLY:-all}
  fi
  if [ "$MODELS" = all ]; then MODELS=$(all_models); fi
  local name
  for name in ${MODELS//,/ }; do add_model "$name"; done
  [ ${#FOLDERS[@]} -gt 0 ] || usage "no models in \"$MODELS\""
}

add_model() { # NAME: folder, number of checkpoint files, size
  local key size variant folder index other
  key=$(lower "$1"); key=${key#llama-2-}; key=${key#codellama-}
  size=${key%%-*}; variant=${key#"$size"}
  case $FAMILY:$size in
    llama2:7b|codellama:7b) set -- "$1" 1 13477 ;;
    llama2:13b|codellama:13b) set -- "$1" 2 26032 ;;
    codellama:34b) set -- "$1" 4 67488 ;;
    llama2:70b) set -- "$1" 8 137954 ;;
    *) unknown_model "$1" ;;
  esac
  case $FAMILY:$variant in
    llama2:|llama2:-chat) folder=llama-2-$key ;;
    codellama:) folder=CodeLlama-$key ;;
    codellama:-python) folder=CodeLlama-$size-Python ;;
    codellama:-instruct) folder=CodeLlama-$size-Instruct ;;
    *) unknown_model "$1" ;;
  esac
  if [ "$LAYOUT" = hf ]; then folder=$folder-hf; fi
  for other in ${FOLDERS[@]+"${FOLDERS[@]}"}; do [ "$other" != "$folder" ] || return; done
  index=${#FOLDERS[@]}
  FOLDERS[index]=$folder SHARDS[index]=$2 MEGABYTES[index]=$3
}

unknown_model() {
  local what="Llama 2" flag="codellama"
  if [ "$FAMILY" = codellama ]; then what="Code Llama" flag="llama2"; fi
  usage "$what has no model \"$1\"; it has $(all_models). For the other family use its own link, or --family $flag"
}

check_space() { # the models' sizes, less what is here already, against what the disk has free
  [ "$SPACE_CHECK" = 1 ] || return
  local i have free needed=0
  for ((i = 0; i < ${#FOLDERS[@]}; i++)); do
    read -r have _ <<< "$(du -sk "${FOLDERS[i]}" 2> /dev/null)"
    have=$((${have:-0} * 1024 / 1000000))
    if [ "$have" -lt "${MEGABYTES[i]}" ]; then needed=$((needed + MEGABYTES[i] - have)); fi
  done
  free=$(df -Pk . | awk 'NR > 1 { for (i = 2; i <= NF; i++) if ($i ~ /^[0-9]+%$/) print int($(i - 1) * 1.024 / 1000) }')
  [ -n "$free" ] || return
  [ "$needed" -le "$free" ] ||
    die "not enough room in $PWD: $((needed / 1000 + 1)) GB more are needed, $((free / 1000)) GB are free" \
      "(--no-space-check starts all the same)"
}

# ---- one run at a time in a folder; what a killed run left alive is ended first

claim_folder() {
  mkdir -p "$DIR" 2> /dev/null
  cd "$DIR" 2> /dev/null || die "cannot make or enter the folder $DIR"
  if [ -d .download ]; then end_leftovers; fi
  mkdir .download 2> /dev/null || die "cannot write into the folder $PWD"
  STATE=.download SCRATCH=.download/main
  trap 'rm -rf .download' EXIT
  trap 'interrupted 130' INT; trap 'interrupted 143' TERM; trap 'interrupted 129' HUP
  echo $$ > .download/pid.main
}

runs_ours() { # PID: is it alive, and a process of this script? (its number may have gone to another program since)
  local line
  kill -0 "$1" 2> /dev/null || return 1
  line=$(tr '\0' ' ' 2> /dev/null < "/proc/$1/cmdline" || ps -o args= -p "$1" 2> /dev/null)
  case $line in *download*|*.part*) return 0 ;; *) return 1 ;; esac
}

end_leftovers() {
  local pid turn file
  read -r pid 2> /dev/null < .download/pid.main || pid=0
  if [ "$pid" -gt 0 ] && runs_ours "$pid"; then
    die "another download.sh (process $pid) is at work in $PWD; wait for it or stop it"
  fi
  for turn in TERM TERM TERM TERM TERM KILL KILL; do
    for file in .download/pid.*; do
      read -r pid 2> /dev/null < "$file" || continue
      if runs_ours "$pid"; then kill -"$turn" "$pid" 2> /dev/null; sleep 1; fi
    done
  done
  rm -rf .download
}

# shellcheck disable=SC2046  # one word per process is meant
stop_children() { kill $(jobs -p) 2> /dev/null; }

interrupted() { # STATUS
  trap '' INT TERM HUP USR1
  stop_children; wait
  warn "stopped; run the same command again to go on: what is verified stays, what is in *.part is resumed"
  exit "$1"
}

# ---- files: a list of them, worked off by JOBS processes that claim one after the other

add_file() { # NAME in the link, PATH on disk, MD5 or nothing
  local index=${#NAMES[@]}
  NAMES[index]=$1 FILES[index]=$2 SUMS[index]=${3:-}
}

work_off() { # FUNCTION: run it for each file that is not done, until the list ends or one says stop
  local job pid
  if [ -e "$STATE/stop" ]; then return; fi
  rmdir "$STATE/$1".* 2> /dev/null
  trap stop_children USR1
  for ((job = 1; job <= JOBS; job++)); do work "$job" "$1" & done
  for pid in $(jobs -p); do
    while kill -0 "$pid" 2> /dev/null; do wait "$pid"; done
  done
}

work() { # JOB, FUNCTION
  local index
  trap '' INT                                    # Ctrl-C reaches every process; the first one tells the others to end
  trap 'stop_children; wait; exit 143' TERM HUP
  trap - EXIT
  JOB=$1 SCRATCH=$STATE/$1
  sh -c 'echo $PPID > "$1"' sh "$STATE/pid.worker$1"
  for ((index = 0; index < ${#FILES[@]}; index++)); do
    if [ -e "$STATE/done.$index" ] || [ -e "$STATE/why.$index" ]; then continue; fi
    if [ "$2" = check_present ] && [ ! -f "${FILES[index]}" ]; then continue; fi
    if mkdir "$STATE/$2.$index" 2> /dev/null; then "$2" "$index"; fi
  done
}

stop_all() { # MESSAGE: no other file would fare better
  [ -e "$STATE/stop" ] || warn "$*"
  : > "$STATE/stop"
  kill -USR1 $$ 2> /dev/null
  exit 1
}

finish() { : > "$STATE/done.$1"; say "${FILES[$1]}: $2"; }           # INDEX, MESSAGE
give_up() { say "$2" > "$STATE/why.$1"; warn "${FILES[$1]}: $2"; }   # INDEX, REASON

check_present() { # INDEX: a file that is there and right is done; a wrong one loses its name
  local file=${FILES[$1]} sum=${SUMS[$1]}
  [ "$sum" != none ] || return
  if [ -n "$sum" ]; then
    if matches "$file" "$sum"; then finish "$1" "$PRESENT"; return; fi
    warn "$file: does not match its checksum"
    mv -f "$file" "$file.part"
  elif [ "${file%.pth}" = "$file" ]; then
    if has_right_type "$file" "$file"; then finish "$1" "${PRESENT/verified/there}"; else rm -f "$file"; fi
  fi
}

fetch() { # INDEX: a file to its .part, and from there to its name once it is proved right
  local file=${FILES[$1]} sum=${SUMS[$1]} part=${FILES[$1]}.part before best=0 failures=0 restarts=0
  [ "$sum" != none ] || { give_up "$1" "its checklist is missing, so nothing could verify it"; return; }
  case $file in */*) [ -d "${file%/*}" ] || mkdir -p "${file%/*}" 2> /dev/null ;; esac
  while :; do
    [ -n "$sum" ] || rm -f "$part"               # without a checksum nothing proves that two halves belong together
    before=$(size_of "$part")
    transfer "${NAMES[$1]}" "$part"
    case $OUTCOME in
      complete)
        if is_right "$part" "$file" "$sum"; then
          if mv -f "$part" "$file"; then finish "$1" "verified"; return; fi
          stop_all "cannot write $file"
        fi
        rm -f "$part"
        if [ "$before" -eq 0 ]; then
          restarts=$((restarts + 1))
          [ "$restarts" -lt 2 ] || { distrust_list "$file" "$sum"; give_up "$1" "$WHY"; return; }
        fi
        warn "$file: $WHY; fetched again from the start" ;;
      again)
        before=$(size_of "$part")
        failures=$((failures + 1))
        if [ -n "$sum" ] && [ "$before" -gt "$best" ]; then best=$before failures=1; fi
        if [ "$failures" -ge "$TRIES" ]; then
          [ "$CODE" -ne 0 ] || stop_all "no connection to the server; run the same command again when there is one"
          give_up "$1" "$WHY"; return
        fi
        warn "$file: $WHY; trying again in $((PAUSE << (failures - 1))) s"
        sleep $((PAUSE << (failures - 1))) & wait $! ;;
      absent) give_up "$1" "$WHY"; return ;;
      hopeless) stop_all "$WHY" ;;
    esac
  done
}

distrust_list() { # FILE, MD5: after two whole transfers that differ from it, the checklist may be the wrong one
  case $1:$2 in
    *:) ;;
    tokenizer.model:*) rm -f tokenizer_checklist.chk ;;
    *) rm -f "${1%/*}/checklist.chk" ;;
  esac
}

is_right() { # PART, FILE, MD5 or nothing: WHY where not
  has_right_type "$1" "$2" || return 1
  if [ -n "$3" ]; then
    WHY="the checksum is wrong"
    matches "$1" "$3"
  else
    WHY="its size is wrong"
    [ -z "$TOTAL" ] || [ "$(size_of "$1")" -eq "$TOTAL" ]
  fi
}

has_right_type() { # PATH, NAME: do the first bytes belong to such a file? WHY where not
  local head
  WHY="it is empty"
  [ -s "$1" ] || return 1
  head=$(head -c 512 "$1" | tr '\000\r\n[:upper:]' '   [:lower:]')
  head=${head#"${head%%[! ]*}"}
  WHY="a web page came instead of the file"
  case $head in '<!doctype'*|'<html'*|'<?xml'*|'<head'*|'<error'*) return 1 ;; esac
  WHY="it is not what its name says"
  case $2 in
    *.chk) ! tr -d '\r' < "$1" | grep -qvE '^[0-9A-Fa-f]{32} [ *][^ ]+$' ;;
    *.json) case $head in '{'*) ;; *) return 1 ;; esac ;;
    *.pth) head -c 2 "$1" | grep -qE '^(PK|'$'\x80'')' ;;
  esac
}

# ---- one transfer by curl or wget; the link travels in a file, where no list of processes shows it

transfer() { # NAME, PART: OUTCOME (complete, again, absent, hopeless), WHY, TOTAL bytes where the server tells
  local status url=${LINK%%\**}$1${LINK#*\*}
  rm -f "$SCRATCH.headers"
  if [ "$CLIENT" = curl ]; then
    (umask 077; printf 'url = "%s"\n' "$url" > "$SCRATCH.url")
    set -- "$2" curl --config "$SCRATCH.url" --silent --show-error --fail --location --globoff --continue-at - \
      --output "$2" --dump-header "$SCRATCH.headers" --connect-timeout "$TIMEOUT" --speed-limit 1 --speed-time "$TIMEOUT"
  else
    (umask 077; printf '%s\n' "$url" > "$SCRATCH.url")
    set -- "$2" wget --input-file="$SCRATCH.url" --no-iri --no-http-keep-alive --continue --output-document="$2" --server-response \
      --output-file="$SCRATCH.headers" --tries=1 --timeout="$TIMEOUT"
  fi
  # The process notes its own number before it becomes curl or wget, so that a killed run leaves no unknown one.
  sh -c 'echo $$ > "$1"; shift 2; exec "$@"' sh "$STATE/pid.transfer$JOB" "$@" 2> "$SCRATCH.errors" &
  status=$!
  show_progress "$status" "$1"
  wait "$status"; status=$?
  rm -f "$SCRATCH.url"
  [ -s "$1" ] || rm -f "$1"
  judge "$status" "$1"
}

headers() { # the last answer's status and the whole file's size
  tr -d '\r' 2> /dev/null < "$SCRATCH.headers" | awk '{ $1 = $1; line = tolower($0) }
    line ~ /^http\/[0-9.]+ [0-9]/ { code = $2; total = "" }
    line ~ /^content-length: / && code != 206 { total = $2 }
    line ~ /^content-range: bytes .*\/[0-9]+$/ { sub(/.*\//, ""); total = $0 }
    END { print code + 0, total }'
}

judge() { # STATUS of curl or wget, PART: CODE of the last answer, 0 without one
  read -r CODE TOTAL <<< "$(headers)"
  WHY="the server answered HTTP $CODE"
  case $CODE:$CLIENT:$1 in
    401:*|403:*) OUTCOME=hopeless WHY="HTTP $CODE: the link is refused. Links expire after 24 hours or a number of downloads: \
ask for a new one at $SITE and run the same command with it. What is verified stays, what is in *.part is resumed" ;;
    404:*|410:*) OUTCOME=absent ;;
    408:*|429:*|5??:*) OUTCOME=again ;;
    416:*|*:curl:33|*:curl:36) OUTCOME=complete ;;   # no such range: complete, too long or wrong, the checksum tells
    *:0) OUTCOME=complete; [ "$(size_of "$2")" -ge "${TOTAL:-0}" ] || OUTCOME=again WHY="the connection was cut" ;;
    *:curl:23|*:wget:3) OUTCOME=hopeless WHY="cannot write into $PWD; is the disk full?" ;;
    *:curl:60|*:curl:77|*:wget:5) OUTCOME=hopeless WHY="the server's certificate is not trusted here" ;;
    4??:*) OUTCOME=absent ;;
    *) OUTCOME=again WHY="no connection, or it was cut" ;;
  esac
}

show_progress() { # PID, PART: on a terminal only; one moving line for one job, a line now and then for several
  local total tick=0
  [ -t 1 ] || return
  while kill -0 "$1" 2> /dev/null; do
    sleep 0.3 & wait $!
    tick=$((tick + 1))
    if [ "$JOBS" -gt 1 ] && [ $((tick % 30)) -ne 0 ]; then continue; fi
    total=$(headers); total=${total#* }
    progress_line "${2%.part}" "$(size_of "$2")" "${total:-0}"
  done
  [ "$JOBS" -gt 1 ] || printf '\r\033[K'
}

progress_line() { # NAME, BYTES, TOTAL or 0
  local line="$1: $(($2 / 1000000)) MB"
  if [ "$3" -gt 0 ]; then line="$line of $(($3 / 1000000)) MB, $(($2 * 100 / $3))%"; fi
  if [ "$JOBS" -gt 1 ]; then say "$line"; else printf '\r%s\033[K' "$line"; fi
}

# ---- Meta's link: the checklists first, then what they list

listed() { # CHECKLIST, NAME: its MD5, nothing where it is not listed, "none" without the list
  [ -s "$1" ] || { echo none; return; }
  tr -d '\r' < "$1" |
    awk -v name="$2" '{ sub(/^\*/, "", $2); sub(/.*\//, "", $2) } $2 == name { print tolower($1); exit }'
}

add_shards() { # FOLDER, COUNT, CHECKLIST
  local shard name
  for ((shard = 0; shard < $2; shard++)); do
    name=$(printf 'consolidated.%02d.pth' "$shard")
    add_file "$1/$name" "$1/$name" "$(listed "$3" "$name")"
  done
}

fetch_from_meta() {
  local i folder list
  if [ "$FAMILY" = llama2 ]; then add_file tokenizer_checklist.chk tokenizer_checklist.chk; fi
  for folder in "${FOLDERS[@]}"; do add_file "$folder/checklist.chk" "$folder/checklist.chk"; done
  work_off check_present; work_off fetch
  if [ "$FAMILY" = llama2 ]; then
    add_file tokenizer.model tokenizer.model "$(listed tokenizer_checklist.chk tokenizer.model)"
  fi
  for ((i = 0; i < ${#FOLDERS[@]}; i++)); do
    folder=${FOLDERS[i]} list=${FOLDERS[i]}/checklist.chk
    add_file LICENSE "$folder/LICENSE"
    add_file USE_POLICY.md "$folder/USE_POLICY.md"
    add_file "$folder/params.json" "$folder/params.json" "$(listed "$list" params.json)"
    if [ "$FAMILY" = codellama ]; then
      add_file "$folder/tokenizer.model" "$folder/tokenizer.model" "$(listed "$list" tokenizer.model)"
    fi
    add_shards "$folder" "${SHARDS[i]}" "$list"
  done
  work_off check_present; work_off fetch
}

report() { # the list of what is not there, and status 1; or how to run what is
  local i why missing=''
  for ((i = 0; i < ${#FILES[@]}; i++)); do
    [ ! -e "$STATE/done.$i" ] || continue
    why=$(cat "$STATE/why.$i" 2> /dev/null)
    missing="$missing  ${FILES[i]}: ${why:-not fetched}"$'\n'
  done
  if [ -n "$missing" ]; then
    printf 'not complete; missing or not verified:\n%s' "$missing" >&2
    exit 1
  fi
  say "Everything is there and verified. To run it:"
  for ((i = 0; i < ${#FOLDERS[@]}; i++)); do run_command "${FOLDERS[i]}"; done
}

run_command() { # FOLDER
  local script=example_text_completion.py here='' tokenizer=tokenizer.model
  case $1 in *-chat*|*-Instruct*) script=example_chat_completion.py ;; esac
  if [ -f "$1/tokenizer.model" ]; then tokenizer=$1/tokenizer.model; fi
  if [ "$DIR" != . ]; then here=$PWD/; fi
  if [ "$HERE" != "$START" ]; then script=$HERE/$script; fi
  printf '  python %q --ckpt_dir %q --tokenizer_path %q\n' "$script" "$here$1/" "$here$tokenizer"
}

# ---- the Hugging Face hub: its client transfers and resumes; the checks and the report are the same

repository() { # FOLDER
  case $1 in
    CodeLlama-*) echo "codellama/$1" ;;
    *) echo "meta-llama/L${1#l}" ;;
  esac
}

fetch_from_hub() {
  local i
  for ((i = 0; i < ${#FOLDERS[@]}; i++)); do
    fetch_repository "${FOLDERS[i]}" "${SHARDS[i]}" "${#FILES[@]}"
  done
}

fetch_repository() { # FOLDER, SHARDS, FIRST: the index of its first file
  local turn i lists="checklist.chk tokenizer_checklist.chk" names
  WHY=''
  if [ "$LAYOUT" = hf ]; then lists=model.safetensors.index.json; fi
  # shellcheck disable=SC2086  # the lists are words
  if ! has_all "$1" $lists; then
    hub "$1" captured $lists LICENSE LICENSE.txt USE_POLICY.md
    PRESENT=verified
  fi
  plan_repository "$1" "$2"
  for turn in 1 2 3; do
    if [ "$LAYOUT" = hf ]; then
      for ((i = $3; i < ${#FILES[@]}; i++)); do SUMS[i]=$(hub_sum "${FILES[i]}"); done
    fi
    work_off check_present
    names=()
    for ((i = $3; i < ${#FILES[@]}; i++)); do
      if [ ! -e "$STATE/done.$i" ]; then rm -f "${FILES[i]}.part"; names[${#names[@]}]=${FILES[i]#"$1"/}; fi
    done
    if [ ${#names[@]} -eq 0 ] || [ -n "$WHY" ] || [ "$turn" = 3 ]; then break; fi
    hub "$1" shown "${names[@]}"
    PRESENT=verified
  done
  PRESENT="verified already, skipped"
  if [ -n "$WHY" ]; then warn "$WHY"; return; fi
  for ((i = $3; i < ${#FILES[@]}; i++)); do
    [ -e "$STATE/done.$i" ] || give_up "$i" "it did not come, or its checksum is wrong"
  done
}

has_all() { # FOLDER, NAME...
  local folder=$1 name; shift
  for name in "$@"; do [ -s "$folder/$name" ] || return 1; done
}

plan_repository() { # FOLDER, SHARDS: the files to have, as the lists on disk tell
  local name
  if [ "$LAYOUT" = original ]; then
    for name in checklist.chk tokenizer_checklist.chk; do add_file "$name" "$1/$name"; done
    add_file params.json "$1/params.json" "$(listed "$1/checklist.chk" params.json)"
    add_file tokenizer.model "$1/tokenizer.model" "$(listed "$1/tokenizer_checklist.chk" tokenizer.model)"
    add_shards "$1" "$2" "$1/checklist.chk"
    return
  fi
  for name in config.json generation_config.json tokenizer.model tokenizer.json tokenizer_config.json \
    special_tokens_map.json model.safetensors.index.json; do add_file "$name" "$1/$name"; done
  for name in $(grep -oE '"[^"/]+\.safetensors"' "$1/model.safetensors.index.json" 2> /dev/null | tr -d '"' | sort -u); do
    add_file "$name" "$1/$name"
  done
}

hub_sum() { # FILE: the SHA-256 that the client noted beside it; nothing for a small file, whose note is another kind
  local note
  note=$(sed -n 2p "${1%/*}/.cache/huggingface/download/${1##*/}.metadata" 2> /dev/null)
  case ${#note} in 0) echo none ;; 64) echo "$note" ;; esac
}

hub() { # FOLDER, captured or shown, NAME...: by the client; WHY where it failed
  local folder=$1 out=$SCRATCH.hub site=${HF_ENDPOINT:-https://huggingface.co} name; shift
  name=$(repository "$folder")
  set -- "$1" "$CLIENT" download "$name" "${@:2}" --local-dir "$folder" --max-workers "$JOBS"
  if [ "$1" = shown ] && [ -t 2 ]
  then "${@:2}" > "$out" &
  else "${@:2}" > "$out" 2>&1 &
  fi
  if wait $!; then return; fi
  if grep -qiE 'connection|timed out|offline|resolve host|name resolution' "$out"; then
    WHY="no connection to the hub at $site"
  elif grep -qiE 'gated|restricted|approval|denied|authenticat|unauthorized|not found|401|403' "$out"; then
    WHY="no access to $name: ask for it at $site/$name, then log in with \"hf auth login\" or set HF_TOKEN"
  else
    WHY="the hub's client stopped: $(without_secrets < "$out")"
  fi
}

without_secrets() { # the last line that says something, without colours and tokens
  sed -e $'s/\033\\[[0-9;]*m//g' -e 's/hf_[A-Za-z0-9_]*/hf_.../g' | grep -v '^Hint' | grep . | tail -n 1
}

main() {
  parse_arguments "$@"
  find_tools
  if [ "$FROM" = meta ]; then read_link; check_link; fi
  read_models
  if [ "$FROM:$FAMILY:$LAYOUT" = hf:codellama:original ]; then
    die "the hub has Code Llama in the Hugging Face layout only: add --layout hf"
  fi
  claim_folder
  check_space
  if [ "$FROM" = meta ]; then fetch_from_meta; else fetch_from_hub; fi
  report
  exit 0
}

main "$@"
