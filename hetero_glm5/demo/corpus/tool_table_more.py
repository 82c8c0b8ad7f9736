"""More rows of tool_table.py's table."""

MORE = """
set_light light_switch switch_light turn_light control_light
does Switch a light | Turn a light on or off | Control the lights
+ room where location place = room : The room
+ state power action = on/off : The new state | What to switch it to
? colour color hue = colour, in {} : Colour of the light
ask Turn {state} the light in the {room}. | Switch the light in the {room} {state}. | Light {state} in the {room}.
gets done=bool
says The light in the {room} is {state}.

set_thermostat heating set_temperature adjust_heating
does Set the heating | Set a room's temperature | Adjust the thermostat
+ room where location = room : The room
+ degrees temperature target value = int:14:28 : Degrees celsius
ask Set the {room} to {degrees} degrees. | Make it {degrees} degrees in the {room}. | Heat the {room} to {degrees}
  degrees.
gets done=bool
says The {room} is set to {degrees} degrees.

lock_door door_lock secure_door lock
does Lock or unlock a door | Control a door lock
+ door which name = front/back/garage : Which door
+ locked lock closed = bool:Lock:Unlock : true to lock
ask {locked} the {door} door. | {locked} the {door} door, please.
gets battery=int:5:100
says Done. The {door} door's lock has {battery} percent battery.

start_vacuum clean_room vacuum robot_clean
does Start the vacuum cleaner | Clean a room
+ rooms places areas = rooms : The rooms
ask Vacuum {rooms}. | Clean {rooms} with the robot. | Let the robot clean {rooms}.
gets minutes=int:5:90
says The robot will take {minutes} minutes.

get_route directions navigate find_route route
does Find a route | Directions between two places | Way from one place to another
+ start origin from_place source = city : Where to start
+ end destination to_place target = city : Where to go
? mode by transport = car/train/bike/bus, by {} : Means of transport
ask How do I get from {start} to {end}? | Find the way from {start} to {end}. | Show me the route from {start} to
  {end}.
gets km=int:3:900 minutes=int:5:600
says From {start} to {end} it is {km} km and takes {minutes} minutes.

get_distance distance how_far measure_distance
does Distance between two places | How far two cities are apart
+ start a origin from_city = city : First city
+ end b destination to_city = city : Second city
ask How far is it from {start} to {end}? | What is the distance between {start} and {end}?
gets km=int:30:9000
says It is {km} km from {start} to {end}.

find_places nearby search_places local_search
does Find places nearby | Search for shops and restaurants
+ kind type category what = venue : Kind of place
+ city near location place = city : Where to look
ask Find a {kind} in {city}. | Is there a {kind} in {city}? | Where is a good {kind} in {city}?
gets name=title street=street
says There is "{name}" at {street} in {city}.

book_table reserve_table restaurant_booking reserve
does Book a table | Reserve a table in a restaurant
+ restaurant name place = title : The restaurant
+ people guests seats persons = int:2:12 : Number of people
+ time at when = time : The time
ask Book a table for {people} at "{restaurant}" at {time}. | Reserve "{restaurant}" for {people} people at {time}.
gets id=id
says Your table for {people} at "{restaurant}" is booked as {id}.

book_flight reserve_flight flight_booking buy_ticket
does Book a flight | Reserve a flight ticket
+ origin start from_city departure = city : Where to start
+ destination end to_city arrival = city : Where to fly
+ date day when = date : Date of the flight
? class cabin seat_class = economy/business, in {} : Cabin class
ask Book a flight from {origin} to {destination} on {date}. | I want to fly from {origin} to {destination} on {date}.
gets flight=flight price=int:49:990
says Flight {flight} from {origin} to {destination} costs {price} euros.

flight_status check_flight track_flight flight_info
does Status of a flight | Track a flight
+ flight number code flight_number = flight : Flight number
ask Is flight {flight} on time? | What is the status of flight {flight}? | Where is flight {flight}?
both Are the flights {a} and {b} on time? | Check the flights {a} and {b}.
gets status=late/boarding/landed gate=int:1:60
says Flight {flight} is {status} at gate {gate}.

book_hotel find_hotel hotel_booking reserve_room
does Book a hotel | Reserve a hotel room
+ city location where place = city : The city
+ nights duration num_nights = int:1:21 : Number of nights
? stars rating min_stars = int:2:5, with {} stars : Stars of the hotel
ask Book a hotel in {city} for {nights} nights. | I need a room in {city} for {nights} nights.
gets hotel=title price=int:40:400
says "{hotel}" in {city} costs {price} euros a night.

call_taxi order_taxi get_cab book_ride
does Order a taxi | Book a ride
+ address pickup street from_address = street : Where to be picked up
? people passengers seats = int:2:6, for {} people : Number of passengers
ask Call a taxi to {address}. | I need a cab at {address}. | Order a taxi to {address}.
gets minutes=int:2:30
says The taxi will be at {address} in {minutes} minutes.

get_order order_status track_order lookup_order
does Look up an order | Status of an order | Track an order
+ order order_id number id = id : Number of the order
ask Where is my order {order}? | What is the status of order {order}? | Track the order {order}.
both Where are my orders {a} and {b}? | Track the orders {a} and {b}.
gets status=shipped/packed/delivered day=day
says Order {order} is {status}; the day is {day}.

cancel_order stop_order revoke_order
does Cancel an order | Stop an order
+ order order_id number id = id : Number of the order
? reason why cause = topic, because of {} : Why
ask Cancel my order {order}. | I do not want order {order} any more. | Please stop order {order}.
gets refund=int:3:900
says Order {order} is cancelled, and you get {refund} euros back.

place_order buy order_item purchase
does Order a product | Buy something in the shop
+ item product article name = goods : What to buy
+ quantity amount count number = int:2:60 : How many
? express fast priority = true, and send it by express : Express delivery
ask Order {quantity} {item}. | Buy {quantity} {item}. | I would like to buy {quantity} {item}.
gets order=id total=num:3:900
says I ordered {quantity} {item} as {order} for {total} euros.

search_products find_product product_search shop_search
does Search the shop | Find products
+ query product text = goods : What to look for
? max_price budget price_limit = int:5:500, under {} euros : Highest price
ask Find {query} in the shop. | Do you sell {query}? | Search the shop for {query}.
gets name=title price=num:3:900
says There is "{name}" for {price} euros.

track_package parcel_status find_parcel package_info
does Track a parcel | Where a package is
+ code tracking number parcel = id : Tracking number
ask Where is the parcel {code}? | Track my package {code}.
gets city=city day=day
says The parcel {code} is in {city} and comes on {day}.

query_database sql run_query db_query
does Run an SQL query | Query the database
+ query sql statement = sql : The SQL statement
ask Run the query "{query}". | Query the database: "{query}".
gets rows=int:0:900
says The query gave {rows} rows.

get_user find_user lookup_user user_info
does Get a user's record | Look up a user
+ user user_id id = int:100:99999 : Number of the user
ask Look up user {user}. | Who is user {user}? | Show me the record of user {user}.
both Look up the users {a} and {b}. | Who are the users {a} and {b}?
gets name=person email=email
says User {user} is {name}, {email}.

create_user add_user register new_user
does Create a user | Register somebody
+ name person user = person : Name of the user
+ age years = int:18:90 : Age in years
? admin is_admin superuser = true, and make them an admin : Whether an admin
ask Create the user {name}, age {age}. | Register {name}, who is {age} years old.
gets id=int:100:99999
says {name} is registered as user {id}.

create_ticket open_issue report_bug new_ticket
does Open a ticket | Report a problem
+ title summary subject = title : Title of the ticket
+ priority level severity = low/medium/high : Priority
ask Open a ticket "{title}" with {priority} priority. | Report "{title}", priority {priority}.
gets ticket=id
says I opened ticket {ticket} for "{title}".

add_todo new_task add_task create_todo
does Add a task | Put something on the to-do list
+ task item text what = errand : The task
? due day deadline = day, by {} : When it is due
ask Put "{task}" on my to-do list. | Add the task "{task}". | New task: "{task}".
gets open=int:1:40
says Done. You now have {open} open tasks.

list_todos get_tasks show_tasks todo_list
does List open tasks | Show the to-do list
ask What is on my to-do list? | Show my open tasks. | What do I still have to do?
gets first=errand count=int:1:40
says You have {count} tasks; the first is to {first}.

take_note add_note save_note write_note
does Save a note | Write something down
+ text note content body = sentence : The note
ask Note: "{text}". | Write down "{text}". | Save the note "{text}".
gets id=id
says Your note is saved as {id}.

get_recipe find_recipe recipe how_to_cook
does Find a recipe | How to cook a dish
+ ingredients items with_food = foods : What to cook with
ask What can I cook with {ingredients}? | Find a recipe with {ingredients}.
gets dish=title minutes=int:5:120
says You can make "{dish}" in {minutes} minutes.

shopping_list add_groceries add_items buy_list
does Add to the shopping list | Put items on the list
+ items products things = foods : The items
ask Put {items} on the shopping list. | Add {items} to my shopping list. | I need to buy {items}.
gets count=int:2:40
says The list now has {count} items.

roll_dice dice roll throw_dice
does Roll dice | Throw dice
+ sides faces kind = int:4:20 : Sides of a die
+ count number dice = int:1:9 : How many dice
ask Roll {count} dice with {sides} sides. | Throw {count} dice that have {sides} sides.
gets total=int:1:99
says The dice show {total}.

random_number pick_number random draw_number
does Pick a random number | Random number in a range
+ low minimum min from_number = int:0:90 : Lowest number
+ high maximum max to_number = int:100:9999 : Highest number
ask Pick a random number between {low} and {high}. | Give me a number from {low} to {high}.
gets number=int:0:9999
says The number is {number}.

flip_coin coin toss heads_or_tails
does Flip a coin | Toss a coin
ask Flip a coin. | Heads or tails? | Toss a coin for me.
gets side=heads/tails
says It is {side}.

get_balance account_balance check_account bank_balance
does Balance of an account | How much money is there
+ account iban account_number number = id : The account
ask How much money is on account {account}? | What is the balance of {account}?
gets balance=num:5:9000
says Account {account} holds {balance} euros.

send_money transfer pay wire_money
does Send money | Transfer money to somebody
+ person to recipient receiver = person : Who gets it
+ amount value euros = num:1:900 : Amount in euros
? note reason reference = topic, for {} : What it is for
ask Send {amount} euros to {person}. | Pay {person} {amount} euros. | Transfer {amount} euros to {person}.
gets id=id
says I sent {amount} euros to {person}.

take_photo camera snapshot capture_image
does Take a photo | Use the camera
ask Take a photo. | Make a picture. | Use the camera now.
gets file=file
says The photo is in {file}.

make_image draw_picture generate_image paint
does Make a picture | Draw an image from words
+ prompt text description = scene : What to show
? size width pixels = int:128:2048, of size {} : Size in pixels
ask Draw {prompt}. | Make a picture of {prompt}. | Paint {prompt}.
gets file=file
says The picture is in {file}.

get_definition define dictionary look_up_word
does Definition of a word | Look up a word
+ word term expression = title : The word
ask What does "{word}" mean? | Define "{word}". | Look up the word "{word}".
gets meaning=sentence
says "{word}" means: "{meaning}".

open_page fetch_url get_page browse read_page
does Fetch a web page | Open an address
+ url address link page = url : Address of the page
ask Open {url}. | What is on {url}? | Read the page {url}.
gets title=title
says The page is called "{title}".

system_status server_status health_check get_status
does Status of the server | Check the system
ask How is the server doing? | Check the system status. | Is the server healthy?
gets load=int:1:99 memory=int:1:99
says The load is {load} percent, and {memory} percent of the memory is used.

restart_service restart reboot_service
does Restart a service | Start a service again
+ service name unit = service : Name of the service
ask Restart the service {service}. | Please restart {service}.
gets seconds=int:1:60
says {service} is back after {seconds} seconds.

filter_list search_items filter_items select_items
does Filter records | Select records by a field
+ filter condition where criteria = filter : Field and value
ask Show the records with {filter}. | Filter by {filter}.
gets count=int:0:900
says {count} records match.
"""
