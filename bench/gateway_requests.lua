-- What wrk sends: 1,024 requests of different paths, arguments and user agents, one after the other, again and again.
--
-- LuaJIT hashes a long string by a few of its bytes, whose places are drawn when Kong starts. Log records that differ in
-- their ids and times alone, as those of one request sent again and again, can then all fall into one bucket; such a Kong
-- takes several times the CPU, and another one, just started, does not. Requests that differ as those of real clients
-- do, in length above all, keep this out of what is compared.

local COUNT = 1024
local requests = {}
local sent = 0

local function hex(length)
  local digits = {}
  for place = 1, length do
    digits[place] = string.format("%x", math.random(0, 15))
  end
  return table.concat(digits)
end

function init()
  math.randomseed(1)
  for number = 1, COUNT do
    wrk.headers["User-Agent"] = "bench/" .. hex(math.random(4, 60))
    local path = wrk.path .. "/" .. hex(math.random(4, 36)) .. "?page=" .. math.random(1, 100000)
    requests[number] = wrk.format(nil, path)
  end
end

function request()
  sent = sent % COUNT + 1
  return requests[sent]
end
